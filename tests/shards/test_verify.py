"""``fractalshards verify``, ``info`` and ``sheet``; of hostile datasets one line names the file, in bounded memory."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from damages import HOSTILE, KEY, MARK, SHARD, SMALL, edit, in_file, npz, overwrite, with_files
from fractalshards import png
from fractalshards.errors import FractalError
from fractalshards.manifest import INFO, RECIPE, SYSTEMS, load_manifest, read_record
from fractalshards.png import decode_image, encode_png
from fractalshards.reader import index_split, iterate_shard
from packing import assert_refused, good, run


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("noun", "name"), [(noun, name) for noun, cases in HOSTILE.items() for name in cases])
def test_verify_names_the_file_at_fault(noun, name, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(png, "_MAX_CHUNKS", 1000)
    HOSTILE[noun][name](dataset)
    before = {path.name for folder in (dataset, tmp_path) for path in folder.iterdir()}
    result = run("verify", dataset, "--workers", 1, "--quiet")
    assert isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code == 1, result.output
    (error,) = result.stderr.splitlines()
    assert error.startswith(f"error: {dataset}")
    bad = result.stdout.splitlines()
    assert all(line.startswith(f"bad: {dataset}/") and line.count(str(dataset)) == 1 for line in bad)
    assert any(noun in line for line in bad or [error])
    assert all(len(line) < 2100 and line.isprintable() for line in [error, *bad])
    assert {path.name for folder in (dataset, tmp_path) for path in folder.iterdir()} == before
    assert not MARK.exists()


def test_info_prints_no_escapes(dataset):
    edit(dataset / INFO, recipe={"[/red]": "\x1b[31m", "params": 5})
    printed = good("info", dataset).stdout
    assert ("[/red]" in printed, "\x1b" in printed) == (True, False)


@pytest.mark.usefixtures("threads")
def test_verify_names_damaged_samples_only(dataset):
    (dataset / ".tmp~elsewhere~1~0~train-000004.tar").write_bytes(b"half")  # of a build that goes on
    assert "10 train images in 2 shards" in good("verify", dataset, "--workers", 1).stdout
    offsets = read_record(dataset, SHARD, "single").offsets
    overwrite(dataset / SHARD, offsets[1] + 812, b"\xaa\xbb\xcc")
    overwrite(dataset / SHARD, offsets[3] + 150, b"999")
    result = run("verify", dataset, "--workers", 1)
    assert_refused(result, 1, str(dataset))
    named = [line.split(": ")[2] for line in result.stdout.splitlines()]
    assert named[1:] == ["000000006", "000000008"]
    assert named[0].startswith("sha256")


def test_index_split_checks_shards(dataset):
    manifest = load_manifest(dataset)
    for damage in (lambda shard: os.truncate(shard, 1000), Path.unlink):
        damage(dataset / SHARD)
        with pytest.raises(FractalError, match=SHARD):
            index_split(manifest, "train")


def test_wrong_usage_is_refused(tmp_path, dataset):
    for arguments, code, noun in (
        (("verify", tmp_path / "nowhere"), 1, "nowhere"),
        (("info", tmp_path), 1, INFO),
        (("info", dataset / SHARD), 1, "is a file"),
        (("sheet", dataset, "--out", dataset / INFO / "x.png"), 1, INFO),
        (("sheet", dataset, "--out", tmp_path / "x.png", "--split", "val"), 1, "'val'"),
        (("sheet", dataset, "--out", tmp_path / "x.tiff"), 2, "--out"),
    ):
        assert_refused(run(*arguments), code, noun)


@pytest.mark.parametrize("name", ["sheet.png", "new/sheet.jpg"])
def test_sheet_has_a_row_per_class(dataset, multi, tmp_path, name):
    for folder in (multi, dataset):
        good("sheet", folder, "--out", tmp_path / name, "--per-class", 2, "--tile", 16)
        with Image.open(tmp_path / name) as sheet:
            assert sheet.size == (44 + 2 * 20, 3 * 20 + 4)
            tile = np.asarray(sheet.convert("RGB"))[4:20, 44:60]
    if name.endswith("png"):
        first = next(iterate_shard(index_split(load_manifest(dataset), "train")[0]))
        assert np.array_equal(tile, decode_image(first.files["png"]))


MEMORY = 1500  # megabytes, the bound that shards/README.md states
# prints the peak memory of a command or one of its workers in kB; that of a child starts at the memory of its parent
MEASURE = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "fractalshards", *sys.argv[1:]], stderr=subprocess.STDOUT)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def big_picture() -> bytes:
    """An image of 64 million pixels in the format that takes most memory: WebP, transparent."""
    buffer = io.BytesIO()
    Image.new("RGBA", (8000, 8000)).save(buffer, "WEBP", method=0)
    return buffer.getvalue()


def recipe_of_lists(folder: Path) -> None:
    in_file(INFO, recipe={"a": "HERE"})(folder)
    lists = "[" + "[]," * 3_900_000 + "[]]"
    (folder / INFO).write_text((folder / INFO).read_text().replace('"HERE"', lists))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "command", "noun", "most"),
    [
        (lambda: recipe_of_lists, "info", "recipe: a", 1000),
        (lambda: recipe_of_lists, "pull", RECIPE, 1000),
        (lambda: npz(bytes(4 * 10**8), zipfile.ZIP_DEFLATED), "verify", SYSTEMS, 200),
        (lambda: npz(bytes(4 * 10**8), zipfile.ZIP_DEFLATED), "push", SYSTEMS, 200),
        (lambda: with_files(txt=bytes(60 << 20)), "verify", KEY, 300),
        (lambda: with_files(png=big_picture()), "verify", KEY, MEMORY),
        (lambda: with_files(png=encode_png(np.zeros((4000, 4000, 3), np.uint8))), "report", "page.html: ", 300),
        (lambda: with_files(png=SMALL + bytes(60 << 20)), "verify", KEY, 400),
    ],
    ids=["recipe", "pull", "systems", "push", "sample", "image", "image in a report", "chunks of an image"],
)
def test_memory_is_bounded(dataset, tmp_path, damage, command, noun, most):
    damage()(dataset)
    out = tmp_path / "page.html"
    more = {"report": ["--out", out, "--workers", 1], "push": [out], "pull": [out]}
    measured = [sys.executable, "-c", MEASURE, command, dataset, *map(str, more.get(command, []))]
    result = subprocess.run(measured, capture_output=True, text=True, timeout=120, check=True)
    assert noun in result.stdout
    assert "Traceback" not in result.stdout
    assert int(result.stdout.splitlines()[-1]) / 1000 < most
