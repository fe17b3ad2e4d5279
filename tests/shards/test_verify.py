"""``fractalshards verify`` names the shard and the key of whatever is wrong, and exits with 1."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from fractalshards.cli import main
from fractalshards.manifest import INFO, RECIPE, SYSTEMS, load_manifest, read_record
from fractalshards.png import decode_image
from fractalshards.reader import index_split, iterate_shard
from fractalshards.systems import write_systems

SHARD = "train-000001.tar"


def verify(dataset: Path) -> Result:
    return CliRunner().invoke(main, ["verify", str(dataset), "--workers", "1"])


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), data, offset)


def test_a_sound_dataset_passes(dataset: Path) -> None:
    result = verify(dataset)
    assert result.exit_code == 0, result.output
    assert "sound" in result.stdout
    assert "10 train images in 2 shards" in result.stdout


def test_a_flipped_byte_in_an_image_is_named(dataset: Path) -> None:
    offset = read_record(dataset, SHARD, "single").offsets[2]
    overwrite(dataset / SHARD, offset + 512 + 300, b"\xaa\xbb\xcc")
    result = verify(dataset)
    assert result.exit_code == 1
    assert "2 problems; fetch the named files again, or render them" in result.stderr
    assert f"{SHARD}: sha256 differs" in result.stdout
    assert f"{SHARD}: 000000007: image cannot be decoded" in result.stdout
    assert "000000006" not in result.stdout


def test_a_changed_label_is_noticed(dataset: Path) -> None:
    end = read_record(dataset, SHARD, "single").offsets[1]
    overwrite(dataset / SHARD, end - 512, b"2")
    result = verify(dataset)
    assert result.exit_code == 1
    assert f"{SHARD}: content digest differs" in result.stdout
    overwrite(dataset / SHARD, end - 512, b"7")
    assert f"{SHARD}: 000000005: label 7, but there are 3 classes" in verify(dataset).stdout
    overwrite(dataset / SHARD, end - 512, b"-")
    assert f"{SHARD}: 000000005: label b'-' is not a class index" in verify(dataset).stdout


def test_a_truncated_tar_is_named(dataset: Path) -> None:
    os.truncate(dataset / SHARD, 3000)
    result = verify(dataset)
    assert result.exit_code == 1
    assert f"{SHARD}: 3000 bytes instead of" in result.stdout


def test_a_damaged_header_is_named_and_the_rest_still_checked(dataset: Path) -> None:
    offset = read_record(dataset, SHARD, "single").offsets[3]
    overwrite(dataset / SHARD, offset + 150, b"999")
    result = verify(dataset)
    assert f"{SHARD}: 000000008: damaged tar header" in result.stdout
    assert "000000009" not in result.stdout


def test_garbage_after_the_end_is_noticed_even_when_hashes_agree(dataset: Path) -> None:
    path = dataset / SHARD
    data = path.read_bytes()
    path.write_bytes(data[:-512] + b"garbage".ljust(512, b"\0"))
    result = verify(dataset)
    assert f"{SHARD}: the tar does not end after its last sample" in result.stdout


@pytest.mark.parametrize("name", ["samples", "sha256", "content_digest"])
def test_manifest_and_sidecar_must_agree(dataset: Path, name: str) -> None:
    sidecar = dataset / "train-000001.json"
    fields = json.loads(sidecar.read_text())
    if name == "samples":
        fields |= {"samples": 4, "label_counts": [2, 1, 1], "offsets": fields["offsets"][:-1]}
    else:
        fields[name] = "0" * len(fields[name])
    sidecar.write_text(json.dumps(fields))
    result = verify(dataset)
    assert result.exit_code == 1
    assert f"{SHARD}: manifest and sidecar disagree on {name}" in result.stdout


def test_a_missing_shard_and_an_unlisted_one_are_named(dataset: Path) -> None:
    (dataset / SHARD).rename(dataset / "train-000009.tar")
    (dataset / ".tmp~elsewhere~1~0~train-000004.tar").write_bytes(b"half")
    result = verify(dataset)
    assert f"{SHARD}: {SHARD} is missing" in result.stdout
    assert "train-000009.tar: not in the manifest" in result.stdout
    assert ".tmp" not in result.stdout


def test_a_sample_in_the_wrong_place_is_named(dataset: Path) -> None:
    for end in ("tar", "json"):
        shutil.copy(dataset / f"train-000000.{end}", dataset / f"train-000001.{end}")
    sidecar = dataset / "train-000001.json"
    fields = json.loads(sidecar.read_text()) | {"name": SHARD}
    sidecar.write_text(json.dumps(fields))
    info = json.loads((dataset / INFO).read_text())
    split = info["splits"]["train"]
    for name in ("bytes", "sha256", "content_digests"):
        split[name][1] = split[name][0]
    (dataset / INFO).write_text(json.dumps(info))
    result = verify(dataset)
    assert result.exit_code == 1
    assert f"{SHARD}: 000000000: expected sample 000000005 here" in result.stdout


def test_hostile_names_do_not_reach_the_terminal(dataset: Path) -> None:
    change = json.loads((dataset / INFO).read_text())
    change["recipe"] = {"[/red]": "\x1b[31m", "params": 5}
    (dataset / INFO).write_text(json.dumps(change))
    result = CliRunner().invoke(main, ["info", str(dataset)])
    assert result.exit_code == 0, result.output
    assert "[/red]" in result.stdout
    assert "\x1b" not in result.stdout
    offset = read_record(dataset, SHARD, "single").offsets[2]
    overwrite(dataset / SHARD, offset, b"\x1b[2J\n")
    result = verify(dataset)
    assert result.exit_code == 1
    assert "\x1b" not in result.stdout


def test_a_name_that_is_no_text_is_shown_escaped_and_short(dataset: Path) -> None:
    start = read_record(dataset, SHARD, "single").offsets[2]
    overwrite(dataset / SHARD, start, b"\xff" * 512)
    (line,) = [line for line in verify(dataset).stdout.splitlines() if "damaged tar header" in line]
    assert line.startswith(rf"bad: {dataset}/{SHARD}: \xff\xff\xff\xff\xff\xff\xff\xff...: damaged tar header")


def test_recipe_and_systems_are_checked(dataset: Path) -> None:
    write_systems(dataset / SYSTEMS, [np.zeros((2, 2, 3))] * 3)
    assert f"{SYSTEMS}: systems digest differs" in verify(dataset).stdout
    (dataset / SYSTEMS).write_bytes(b"PK\x03\x04 not a zip file")
    assert f"{SYSTEMS}: damaged" in verify(dataset).stdout
    recipe = json.loads((dataset / RECIPE).read_text())
    recipe["recipe"]["n"] = 11
    (dataset / RECIPE).write_text(json.dumps(recipe))
    result = verify(dataset)
    assert f"{RECIPE}: recipe and manifest disagree" in result.stdout
    assert "or render them again with 'fractalgen repair'" in result.stderr


def test_commands_fail_in_one_line(tmp_path: Path, dataset: Path) -> None:
    for arguments, code, words in (
        (["verify", str(tmp_path / "nowhere")], 1, "no such folder"),
        (["info", str(tmp_path)], 1, f"no {INFO}"),
        (["info"], 2, "Missing argument 'DIR'"),
        (["verify", str(dataset), "--workers", "0"], 2, "--workers"),
        (["sheet", str(dataset), "--out", str(dataset / INFO / "x.png")], 1, "choose a path that is not a file"),
        (["sheet", str(dataset), "--out", str(tmp_path / "x.png"), "--split", "val"], 1, "no split 'val'"),
        (["sheet", str(dataset), "--out", str(tmp_path / "x.tiff")], 2, "ends in .png or .jpg"),
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == code, (arguments, result.output)
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert words in result.stderr


def test_info_shows_the_dataset(dataset: Path) -> None:
    result = CliRunner().invoke(main, ["info", str(dataset)])
    assert result.exit_code == 0
    assert "10 images in 2 shards" in result.stdout
    assert "16 x 16" in result.stdout


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_sheet_shows_images_of_every_class_in_its_row(dataset: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / "new" / f"sheet.{suffix}"
    result = CliRunner().invoke(main, ["sheet", str(dataset), "--out", str(out), "--per-class", "2", "--tile", "16"])
    assert result.exit_code == 0, result.output
    with Image.open(out) as sheet:
        assert sheet.size == (44 + 2 * 20, 3 * 20 + 4)
        tile = np.asarray(sheet.convert("RGB"))[4:20, 44:60]
    if suffix == "png":
        first = next(iterate_shard(index_split(load_manifest(dataset), "train")[0]))
        assert np.array_equal(tile, decode_image(first.files["png"]))
