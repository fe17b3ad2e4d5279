"""``fractalshards verify`` names the shard and the key of whatever is wrong, and exits with 1."""

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

SHARD = "train-000001.tar"


def verify(dataset: Path) -> Result:
    return CliRunner().invoke(main, ["verify", str(dataset), "--workers", "1"])


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), data, offset)


def test_verify_sound(dataset: Path) -> None:
    result = verify(dataset)
    assert result.exit_code == 0, result.output
    assert "sound" in result.stdout
    assert "10 train images in 2 shards" in result.stdout


def test_verify_flipped_byte(dataset: Path) -> None:
    offset = read_record(dataset, SHARD, "single").offsets[2]
    overwrite(dataset / SHARD, offset + 512 + 300, b"\xaa\xbb\xcc")
    result = verify(dataset)
    assert result.exit_code == 1
    assert "2 problems; fetch the named files again, or render them" in result.stderr
    assert f"{SHARD}: sha256 differs" in result.stdout
    assert f"{SHARD}: 000000007: image cannot be decoded" in result.stdout
    assert "000000006" not in result.stdout


def test_verify_continues_after_a_damaged_header(dataset: Path) -> None:
    offset = read_record(dataset, SHARD, "single").offsets[3]
    overwrite(dataset / SHARD, offset + 150, b"999")
    result = verify(dataset)
    assert f"{SHARD}: 000000008: damaged tar header" in result.stdout
    assert "000000009" not in result.stdout


def test_verify_ignores_temporary_files(dataset: Path) -> None:
    (dataset / SHARD).rename(dataset / "train-000009.tar")
    (dataset / ".tmp~elsewhere~1~0~train-000004.tar").write_bytes(b"half")
    result = verify(dataset)
    assert f"{SHARD}: {SHARD} is missing" in result.stdout
    assert "train-000009.tar: not in the manifest" in result.stdout
    assert ".tmp" not in result.stdout


def test_errors_are_one_line(tmp_path: Path, dataset: Path) -> None:
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


def test_info(dataset: Path) -> None:
    result = CliRunner().invoke(main, ["info", str(dataset)])
    assert result.exit_code == 0
    assert "10 images in 2 shards" in result.stdout
    assert "16 x 16" in result.stdout


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_sheet_has_a_row_per_class(dataset: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / "new" / f"sheet.{suffix}"
    result = CliRunner().invoke(main, ["sheet", str(dataset), "--out", str(out), "--per-class", "2", "--tile", "16"])
    assert result.exit_code == 0, result.output
    with Image.open(out) as sheet:
        assert sheet.size == (44 + 2 * 20, 3 * 20 + 4)
        tile = np.asarray(sheet.convert("RGB"))[4:20, 44:60]
    if suffix == "png":
        first = next(iterate_shard(index_split(load_manifest(dataset), "train")[0]))
        assert np.array_equal(tile, decode_image(first.files["png"]))
