"""``fractalshards verify``, ``info`` and ``sheet``; hostile datasets are in ``test_hostile``."""

import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from fractalshards.cli import main
from fractalshards.manifest import INFO, load_manifest, read_record
from fractalshards.png import decode_image
from fractalshards.reader import index_split, iterate_shard
from packing import assert_refused

pytestmark = pytest.mark.usefixtures("threads")
SHARD = "train-000001.tar"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_verify_names_damaged_samples_only(dataset: Path) -> None:
    result = run("verify", dataset, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert "10 train images in 2 shards" in result.stdout
    offsets = read_record(dataset, SHARD, "single").offsets
    with (dataset / SHARD).open("r+b") as file:
        os.pwrite(file.fileno(), b"\xaa\xbb\xcc", offsets[1] + 812)
        os.pwrite(file.fileno(), b"999", offsets[3] + 150)
    result = run("verify", dataset, "--workers", 1)
    assert_refused(result, 1, str(dataset))
    named = [line.split(": ")[2] for line in result.stdout.splitlines()]
    assert named[1:] == ["000000006", "000000008"]
    assert named[0].startswith("sha256")


def test_verify_ignores_temporary_files(dataset: Path) -> None:
    (dataset / SHARD).rename(dataset / "train-000009.tar")
    (dataset / ".tmp~elsewhere~1~0~train-000004.tar").write_bytes(b"half")
    result = run("verify", dataset, "--workers", 1)
    assert [line.split(": ")[1] for line in result.stdout.splitlines()] == [
        f"{dataset}/{SHARD}",
        f"{dataset}/train-000009.tar",
    ]


def test_wrong_usage_is_refused(tmp_path: Path, dataset: Path) -> None:
    for arguments, code, noun in (
        (("verify", tmp_path / "nowhere"), 1, "nowhere"),
        (("info", tmp_path), 1, INFO),
        (("info",), 2, "DIR"),
        (("verify", dataset, "--workers", 0), 2, "--workers"),
        (("sheet", dataset, "--out", dataset / INFO / "x.png"), 1, INFO),
        (("sheet", dataset, "--out", tmp_path / "x.png", "--split", "val"), 1, "'val'"),
        (("sheet", dataset, "--out", tmp_path / "x.tiff"), 2, "--out"),
    ):
        assert_refused(run(*arguments), code, noun)


@pytest.mark.parametrize("name", ["sheet.png", "new/sheet.jpg"])
def test_sheet_has_a_row_per_class(dataset: Path, multi: Path, tmp_path: Path, name: str) -> None:
    for folder in (multi, dataset):
        result = run("sheet", folder, "--out", tmp_path / name, "--per-class", 2, "--tile", 16)
        assert result.exit_code == 0, result.output
        with Image.open(tmp_path / name) as sheet:
            assert sheet.size == (44 + 2 * 20, 3 * 20 + 4)
            tile = np.asarray(sheet.convert("RGB"))[4:20, 44:60]
    if name.endswith("png"):
        first = next(iterate_shard(index_split(load_manifest(dataset), "train")[0]))
        assert np.array_equal(tile, decode_image(first.files["png"]))
