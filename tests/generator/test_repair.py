"""``fractalgen repair`` renders exactly the damaged and missing shards again, and restores the dataset."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from building import SMALL, files, run, times
from fractalshards.cli import main as fractalshards
from fractalshards.digest import mapping_digest, systems_digest
from fractalshards.systems import write_systems

pytestmark = pytest.mark.usefixtures("threads")


def repair(folder: Path) -> Result:
    return run("repair", folder, "--workers", 1)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "copy")


def other_recipe(path: Path) -> None:
    edit(path, lambda fields: fields["recipe"].update(seed=5))


SHARD_DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("train-000001.tar", lambda path: flip(path, 2000)),
    ("train-000002.tar", lambda path: flip(path, 3)),
    ("val-000000.tar", lambda path: os.truncate(path, 5000)),
    ("train-000003.tar", Path.unlink),
    ("train-000004.json", Path.unlink),
    ("train-000001.json", lambda path: shutil.copy(path.with_name("train-000000.json"), path)),
    ("train-000000.json", lambda path: edit(path, lambda fields: fields.update(content_digest="0" * 32))),
]
OTHER_DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("_info.json", Path.unlink),
    ("_info.json", lambda path: os.truncate(path, 99)),
    ("_info.json", other_recipe),
    ("recipe.json", Path.unlink),
    ("recipe.json", other_recipe),
    ("systems.npz", Path.unlink),
    ("systems.npz", lambda path: write_systems(path, [np.zeros((2, 2, 3))] * 20)),
    ("systems.npz", lambda path: os.truncate(path, 1000)),
]


@pytest.mark.parametrize(("name", "damage"), SHARD_DAMAGES)
def test_repair_renders_only_the_damaged_shard(built: Path, copy: Path, name: str, damage: Callable) -> None:
    damage(copy / name)
    whole = {path.name: path.stat().st_mtime_ns for path in copy.glob("*.tar") if path.stem != Path(name).stem}
    result = repair(copy)
    assert result.exit_code == 0, result.output
    assert f"rendered again: {Path(name).stem}.tar" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("sound: ")
    assert files(copy) == files(built)
    assert {name: (copy / name).stat().st_mtime_ns for name in whole} == whole
    assert CliRunner().invoke(fractalshards, ["verify", str(copy), "--workers", "1"]).exit_code == 0


@pytest.mark.parametrize(("name", "damage"), OTHER_DAMAGES)
def test_repair_restores_other_files_without_rendering(built: Path, copy: Path, name: str, damage: Callable) -> None:
    damage(copy / name)
    result = repair(copy)
    assert result.exit_code == 0, result.output
    assert "rendered again" not in result.stdout
    assert files(copy) == files(built)


def test_repair_leaves_a_sound_dataset_alone(copy: Path) -> None:
    before = times(copy)
    result = repair(copy)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("sound: ")
    assert times(copy) == before


def test_repair_finishes_an_unfinished_build(built: Path, copy: Path) -> None:
    for name in ("_info.json", "train-000000.tar", "train-000000.json", "val-000000.json"):
        (copy / name).unlink()
    assert repair(copy).exit_code == 0
    assert files(copy) == files(built)


def test_repair_refuses_shards_that_differ_from_the_manifest(built: Path, copy: Path) -> None:
    edit(copy / "_info.json", lambda fields: fields["splits"]["val"].update(content_digests=["0" * 32]))
    for _ in range(2):  # the manifest stays as it is
        result = repair(copy)
        assert result.exit_code == 1
        assert "val-000000.tar" in result.stderr.splitlines()[-1]
    (copy / "_info.json").unlink()
    assert repair(copy).exit_code == 0
    assert files(copy) == files(built)


def test_repair_names_what_it_cannot_repair(copy: Path, tmp_path: Path) -> None:
    part = shutil.copytree(copy, tmp_path / "part")
    edit(part / "_info.json", lambda fields: fields["splits"].pop("val"))  # as 'fractalshards pull --shards' leaves it
    extra = shutil.copytree(copy, tmp_path / "extra")
    shutil.copy(copy / "val-000000.tar", extra / "extra.tar")
    edit(copy / "_info.json", lambda fields: fields["recipe"].update(version=1))
    os.truncate(copy / "recipe.json", 10)
    for folder, noun in (
        (part, "part"),
        (extra, "extra.tar"),
        (copy, "recipe version 1"),
        (tmp_path / "nowhere", "recipe.json"),
    ):
        result = repair(folder)
        assert result.exit_code == 1
        assert "sound:" not in result.stdout
        assert noun in result.stderr.splitlines()[-1]


def test_systems_that_the_kind_cannot_render_are_refused(copy: Path) -> None:
    """A folder from elsewhere may be consistent and still hold unusable systems."""
    systems = [np.zeros((3, 7))] * 20
    write_systems(copy / "systems.npz", systems)

    def change(fields: dict) -> None:
        fields["recipe"]["systems_digest"] = systems_digest(systems)
        fields["recipe_digest"] = mapping_digest(fields["recipe"])

    edit(copy / "recipe.json", change)
    for command in (["repair", copy], [*SMALL, "--out", copy]):
        result = run(*command)
        assert result.exit_code == 1, result.output
        assert "systems.npz" in result.stderr.splitlines()[-1]
