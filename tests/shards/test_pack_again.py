"""Packing that is run again: stopped, damaged, with another recipe, or with images that cannot be read."""

import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from fractalshards import pack as pack_module
from fractalshards.cli import main
from fractalshards.errors import FractalError
from fractalshards.manifest import load_manifest
from fractalshards.pack import parse_source, plan_pack, run_pack
from packed_flowers import FRACTALSHARDS, Encode, Make, images, names, pack


def test_seed_and_shard_size_decide_and_workers_do_not(flowers: Path, packed: Path, tmp_path: Path) -> None:
    def digest(name: str, *options: str) -> str:
        split = ("--split", "val=.20,train=0.80", "--shard-size", "8")
        result = pack(f"imagefolder:{flowers}", tmp_path / name, *split, *options)
        assert result.exit_code == 0, result.output
        return load_manifest(tmp_path / name).content_digest()

    assert digest("two", "--workers", "2") == load_manifest(packed).content_digest()
    assert digest("other", "--seed", "1") != load_manifest(packed).content_digest()
    assert images(tmp_path / "other", "val") != images(packed, "val")


def test_running_again_does_only_what_is_missing(flowers: Path, packed: Path, tmp_path: Path) -> None:
    again = (f"imagefolder:{flowers}", tmp_path / "out", "--split", "train=0.8,val=0.2", "--shard-size", "8")
    out = shutil.copytree(packed, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    result = pack(*again)
    assert result.exit_code == 0, result.output
    assert "to pack: 0 images" in result.stderr
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    (out / "train-000001.json").unlink()
    os.truncate(out / "val-000000.tar", 700)
    (out / f".tmp~{os.uname().nodename}~999999999~00000000~train-000004.tar").write_bytes(b"half")
    result = pack(*again)
    assert "in 5 shards, 3 of them done" in result.stderr
    assert "to pack: 15 images" in result.stderr
    assert names(out) == names(packed)
    assert load_manifest(out).splits == load_manifest(packed).splits
    assert (out / "train-000000.tar").stat().st_mtime_ns == before["train-000000.tar"]


def test_another_recipe_and_a_folder_that_is_no_dataset_are_left_alone(
    flowers: Path, packed: Path, tmp_path: Path
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in packed.iterdir()}
    for options, words in (
        (("--split", "train=0.8,val=0.2", "--shard-size", "9"), "shard_size 8 there, 9 here"),
        (("--split", "train=0.9,val=0.1", "--shard-size", "8"), "val_share 0.2 there, 0.1 here"),
        (("--split", "train=0.8,val=0.2", "--shard-size", "8", "--seed", "1"), "seed 0 there, 1 here"),
    ):
        result = pack(f"imagefolder:{flowers}", packed, *options)
        assert result.exit_code == 1
        assert words in result.stderr
    other = shutil.copytree(flowers, tmp_path / "other")
    (other / "rose" / "025.jpg").rename(other / "rose" / "renamed.jpg")
    result = pack(f"imagefolder:{other}", packed, "--split", "train=0.8,val=0.2", "--shard-size", "8")
    assert "(files " in result.stderr
    assert {path.name: path.stat().st_mtime_ns for path in packed.iterdir()} == before
    (tmp_path / "thesis.tex").write_text("precious")
    result = pack(f"imagefolder:{flowers}", tmp_path)
    assert "no recipe.json; choose an empty or new folder" in result.stderr
    assert names(tmp_path) == ["other", "thesis.tex"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_half_way_it_continues_to_the_same_dataset(
    tmp_path: Path, image_folder: Make, number: signal.Signals, code: int
) -> None:
    big = image_folder(tmp_path / "big", {"a": 80, "b": 80})
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "killed"
    assert pack(f"imagefolder:{big}", undisturbed, "--shard-size", "1").exit_code == 0
    command = [FRACTALSHARDS, "pack", f"imagefolder:{big}", out, "--shard-size", "1", "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(out.glob("train-*.json"))) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    if number != signal.SIGKILL:
        advice = "stopped; finished shards are kept, run the same command again to go on"
        assert errors.splitlines()[-1] == f"error: {out}: {advice}"
    assert not (out / "_info.json").exists()
    result = subprocess.run(command, text=True, capture_output=True, timeout=100)
    assert result.returncode == 0, result.stderr
    assert "of them done" in result.stderr
    assert load_manifest(out).content_digest() == load_manifest(undisturbed).content_digest()


def test_all_bad_images_are_named_and_nothing_looks_finished(
    tmp_path: Path, image_folder: Make, image_file: Encode
) -> None:
    source = image_folder(tmp_path / "in", {"a": 6, "b": 6})
    whole = (source / "a" / "003.jpg").read_bytes()
    (source / "a" / "003.jpg").write_bytes(whole[:-200])
    run = (f"imagefolder:{source}", tmp_path / "out", "--shard-size", "2")
    result = pack(*run)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert f"{source}/a/003.jpg: image cannot be decoded" in line
    assert "replace it and run the same command again, or remove it and pack into a new folder" in line
    (source / "b" / "009.jpg").write_text("<html>not found</html>")
    (source / "b" / "010.jpg").write_bytes(b"")
    shutil.rmtree(tmp_path / "out")
    result = pack(*run)
    for name in ("a/003.jpg", "b/009.jpg", "b/010.jpg"):
        assert f"{source}/{name}: image cannot be decoded" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "_info.json").exists()
    assert not [name for name in names(tmp_path / "out") if name.startswith(".")]
    for name, seed in (("a/003.jpg", 3), ("b/009.jpg", 9), ("b/010.jpg", 10)):
        (source / name).write_bytes(image_file("JPEG", 20, 20, seed))
    result = pack(*run)
    assert result.exit_code == 0, result.output
    assert "of them done" in result.stderr


def test_an_image_too_large_for_a_sample_is_named(tmp_path: Path, image_folder: Make) -> None:
    source = image_folder(tmp_path / "in", {"a": 2, "b": 2})
    os.truncate(source / "a" / "001.jpg", 72_000_000)  # decoders stop where the image ends
    os.truncate(source / "b" / "002.jpg", (64 << 20) - 1)  # itself small enough, but not with its headers
    result = pack(f"imagefolder:{source}", tmp_path / "out")
    assert result.exit_code == 1
    error = result.stderr.splitlines()[-1]
    assert f"{source}/a/001.jpg: larger than 64 MiB, too large for a sample" in error
    assert f"{source}/b/002.jpg: a sample of 67,110,400 bytes, but it may have 64 MiB at most" in error
    assert not list((tmp_path / "out").glob("*.tar"))
    os.truncate(source / "a" / "001.jpg", 60_000_000)
    os.truncate(source / "b" / "002.jpg", 60_000_000)
    result = pack(f"imagefolder:{source}", tmp_path / "out")
    assert result.exit_code == 0, result.output


def test_a_shard_that_vanishes_is_an_error(tmp_path: Path, image_folder: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source = image_folder(tmp_path / "in", {"a": 2, "b": 2})
    plan = plan_pack(tmp_path / "out", parse_source(f"imagefolder:{source}", None), 0, 2)
    monkeypatch.setattr(pack_module, "run_jobs", lambda *_: ())  # all went well, they say
    with pytest.raises(FractalError, match=r"train-000000.tar, train-000001.tar vanished after being written; check"):
        run_pack(plan, 1)


def test_verify_wants_systems_just_where_the_recipe_names_them(packed: Path, tmp_path: Path) -> None:
    out = shutil.copytree(packed, tmp_path / "out")
    (out / "systems.npz").write_bytes(b"")
    result = CliRunner().invoke(main, ["verify", str(out), "--workers", "1"])
    assert result.exit_code == 1
    assert "systems.npz: not in the recipe" in result.stdout


def flip_a_bit(tar: Path) -> None:
    data = bytearray(tar.read_bytes())
    data[800] ^= 1
    tar.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_bit, "sha256 differs"),
        (lambda tar: os.truncate(tar, 700), "700 bytes instead of"),
        (lambda tar: tar.with_suffix(".json").write_text("{}"), "is missing or not"),
        (Path.unlink, "is missing"),
    ],
    ids=["flipped bit", "cut off", "sidecar", "missing"],
)
def test_what_verify_advises_for_a_damaged_dataset_mends_it(
    flowers: Path, packed: Path, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    out = shutil.copytree(packed, tmp_path / "out")
    damage(out / "train-000001.tar")
    result = CliRunner().invoke(main, ["verify", str(out), "--workers", "1"])
    assert result.exit_code == 1
    assert [line for line in result.stdout.splitlines() if "train-000001" in line and words in line], result.stdout
    assert result.stderr.splitlines()[-1].endswith(
        "; fetch the named files again, or remove each named tar and the .json beside it, then run the same "
        "'fractalshards pack' again"
    )
    for name in ("train-000001.tar", "train-000001.json"):
        (out / name).unlink(missing_ok=True)
    result = pack(f"imagefolder:{flowers}", out, "--split", "train=0.8,val=0.2", "--shard-size", "8")
    assert result.exit_code == 0, result.output
    assert "to pack: 8 images" in result.stderr
    assert load_manifest(out).content_digest() == load_manifest(packed).content_digest()
    assert CliRunner().invoke(main, ["verify", str(out), "--workers", "1"]).exit_code == 0


def test_verify_notices_a_format_that_is_named_wrongly(packed: Path, tmp_path: Path) -> None:
    out = shutil.copytree(packed, tmp_path / "out")
    path = out / "train-000001.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        member = tar.getmembers()[0]
    member.name = member.name.replace(".jpg", ".png")
    data[:512] = member.tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(data)
    result = CliRunner().invoke(main, ["verify", str(out), "--workers", "1"])
    assert result.exit_code == 1
    assert "train-000001.tar: 000000008: its image is named .png but is a .jpg" in result.stdout
