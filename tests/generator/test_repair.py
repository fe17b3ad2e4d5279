"""``fractalgen repair`` renders again exactly what is damaged or missing, and the dataset is what it was."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from fractalgen.cli import main
from fractalshards.cli import main as fractalshards
from fractalshards.digest import mapping_digest, systems_digest
from fractalshards.systems import write_systems

pytestmark = pytest.mark.usefixtures("threads")


def repair(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["repair", str(folder), "--workers", "1", *options])


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict], None]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "copy")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a flipped pixel": (lambda folder: flip(folder / "train-000001.tar", 2000), "train-000001.tar"),
    "a flipped header": (lambda folder: flip(folder / "train-000002.tar", 3), "train-000002.tar"),
    "cut off": (lambda folder: os.truncate(folder / "val-000000.tar", 5000), "val-000000.tar"),
    "no tar": (lambda folder: (folder / "train-000003.tar").unlink(), "train-000003.tar"),
    "no sidecar": (lambda folder: (folder / "train-000004.json").unlink(), "train-000004.json"),
    "another sidecar": (
        lambda folder: shutil.copy(folder / "train-000000.json", folder / "train-000001.json"),
        "train-000001.json",
    ),
    "a digest in the sidecar": (
        lambda folder: edit(folder / "train-000000.json", lambda fields: fields.update(content_digest="0" * 32)),
        "train-000000.json",
    ),
    "no manifest": (lambda folder: (folder / "_info.json").unlink(), ""),
    "half a manifest": (lambda folder: os.truncate(folder / "_info.json", 99), ""),
    "another recipe in the manifest": (
        lambda folder: edit(folder / "_info.json", lambda fields: fields["recipe"].update(seed=5)),
        "",
    ),
    "a hash in the manifest": (
        lambda folder: edit(folder / "_info.json", lambda fields: fields["splits"]["val"].update(sha256=["0" * 64])),
        "val-000000.tar",
    ),
    "no recipe": (lambda folder: (folder / "recipe.json").unlink(), ""),
    "another recipe": (lambda folder: edit(folder / "recipe.json", lambda fields: fields["recipe"].update(seed=5)), ""),
    "no systems": (lambda folder: (folder / "systems.npz").unlink(), ""),
    "other systems": (lambda folder: write_systems(folder / "systems.npz", [np.zeros((2, 2, 3))] * 20), ""),
    "half the systems": (lambda folder: os.truncate(folder / "systems.npz", 1000), ""),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_repair_renders_only_what_is_damaged(built: Path, copy: Path, what: str) -> None:
    damage, name = DAMAGES[what]
    damage(copy)
    whole = {path.name: path.stat().st_mtime_ns for path in copy.glob("*.tar") if path.stem != Path(name).stem}
    result = repair(copy)
    assert result.exit_code == 0, result.output
    assert files(copy) == files(built)
    assert {name: (copy / name).stat().st_mtime_ns for name in whole} == whole
    assert ("rendered again: " + Path(name).stem in result.stdout) == bool(name)
    assert result.stdout.splitlines()[-1].startswith("sound: ")
    assert CliRunner().invoke(fractalshards, ["verify", str(copy), "--workers", "1"]).exit_code == 0


def test_repair_leaves_a_sound_dataset_alone(copy: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    result = repair(copy)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("sound: ")
    assert "repairing" in result.stderr
    assert repair(copy, "--quiet").stderr == ""
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_repair_finishes_an_unfinished_build(built: Path, copy: Path) -> None:
    for name in ("_info.json", "train-000000.tar", "train-000000.json", "val-000000.json"):
        (copy / name).unlink()
    assert repair(copy).exit_code == 0
    assert files(copy) == files(built)


def test_repair_refuses_what_the_manifest_did_not_promise(built: Path, copy: Path) -> None:
    edit(copy / "_info.json", lambda fields: fields["splits"]["val"].update(content_digests=["0" * 32]))
    for _ in range(2):  # the promise stands
        result = repair(copy)
        assert result.exit_code == 1
        assert "val-000000.tar" in result.stderr.splitlines()[-1]
    (copy / "_info.json").unlink()
    assert repair(copy).exit_code == 0
    assert files(copy) == files(built)


def test_repair_refuses_a_part_of_a_dataset(copy: Path) -> None:
    """As ``fractalshards pull --shards`` leaves it."""

    def drop_val(fields: dict) -> None:
        del fields["splits"]["val"]

    edit(copy / "_info.json", drop_val)
    result = repair(copy)
    assert result.exit_code == 1
    assert "part" in result.stderr.splitlines()[-1]


def test_repair_names_a_tar_that_is_no_shard(copy: Path) -> None:
    shutil.copy(copy / "val-000000.tar", copy / "extra.tar")
    result = repair(copy)
    assert result.exit_code == 1
    assert "sound:" not in result.stdout
    assert "extra.tar" in result.stderr.splitlines()[-1]


def test_systems_that_the_kind_cannot_render_are_refused(small: list[str], copy: Path) -> None:
    """A folder from elsewhere may agree with itself and still be of no use."""
    systems = [np.zeros((3, 7))] * 20
    write_systems(copy / "systems.npz", systems)

    def change(fields: dict) -> None:
        fields["recipe"]["systems_digest"] = systems_digest(systems)
        fields["recipe_digest"] = mapping_digest(fields["recipe"])

    edit(copy / "recipe.json", change)
    for command in (["repair", str(copy)], [*small, "--out", str(copy)]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1, result.output
        assert "systems.npz" in result.stderr.splitlines()[-1]


def test_repair_without_a_sound_recipe_is_refused_in_one_line(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    edit(copy / "_info.json", lambda fields: fields["recipe"].update(version=1))
    os.truncate(copy / "recipe.json", 10)
    for folder, noun in (
        (tmp_path / "empty", "recipe.json"),
        (tmp_path / "nowhere", "recipe.json"),
        (copy, "recipe version 1"),
    ):
        result = repair(folder)
        assert result.exit_code == 1
        (line,) = result.stderr.splitlines()
        assert noun in line
