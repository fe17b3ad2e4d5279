"""Portable recipes: they rebuild the same dataset, keep every float, and are refused if they contradict themselves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from building import files, succeed
from building import run as fractalgen
from fractalgen.recipe import RECIPE_VERSION
from fractalshards.digest import mapping_digest, systems_digest
from fractalshards.errors import FractalError
from fractalshards.manifest import INFO, RECIPE, SYSTEMS, load_manifest
from fractalshards.recipe_file import PortableRecipe, export_recipe, parse_portable, read_portable
from fractalshards.storage import write_json
from fractalshards.systems import read_systems, write_systems
from packing import assert_refused, good, is_sound, run

pytestmark = pytest.mark.usefixtures("threads")


def exported(dataset: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(export_recipe(load_manifest(dataset)))
    return data


def parse(data: object) -> PortableRecipe:
    return parse_portable(json.dumps(data).encode(), "portable.json")


def seal(data: dict[str, Any]) -> dict[str, Any]:
    """Make the digests match, as somebody would who wants a changed file to be accepted."""
    data["recipe"]["systems_digest"] = systems_digest([np.array(system, np.float64) for system in data["systems"]])
    digests = {name: split["content_digests"] for name, split in data["splits"].items()}
    return {**data, "recipe_digest": mapping_digest(data["recipe"]), "content_digest": mapping_digest(digests)}


@pytest.mark.parametrize("kind", ["fractaldb", "multi"])
def test_recipe_rebuilds_the_same_files(tmp_path, kind):
    options = f"--workers 1 --kind {kind} --n 48 --val 12 --classes 6 --size 48 --points 2000 --seed 9 --shard-size 16"
    succeed("build", *options.split(), "--out", tmp_path / "first")
    good("recipe", tmp_path / "first", "--out", tmp_path / "recipe.json")
    succeed("build", "--recipe", tmp_path / "recipe.json", "--out", tmp_path / "second")
    assert files(tmp_path / "first") == files(tmp_path / "second")

    fields = json.loads((tmp_path / "recipe.json").read_text())
    fields["splits"]["val"]["content_digests"][0] = "0" * 32
    (tmp_path / "recipe.json").write_text(json.dumps(seal(fields)))
    again = fractalgen("build", "--recipe", tmp_path / "recipe.json", "--out", tmp_path / "second")
    assert_refused(again, 1, "val-000000.tar")


def test_build_refuses_recipes_it_cannot_use(dataset, tmp_path):
    data = exported(dataset)
    data["recipe"]["version"] = RECIPE_VERSION - 1
    (tmp_path / "older.json").write_text(json.dumps(seal(data)))
    for options, code, noun in (
        (("--recipe", tmp_path / "older.json", "--n", "5"), 2, "--n"),
        (("--recipe", tmp_path / "older.json", "--set", "maps=2"), 2, "--set"),
        (("--kind", "single"), 2, "--n"),
        (("--recipe", tmp_path / "none.json"), 1, "none.json"),
        (("--recipe", dataset / RECIPE), 1, "recipe.json"),
        (("--recipe", tmp_path / "older.json"), 1, "older.json"),
    ):
        assert_refused(fractalgen("build", *options, "--out", tmp_path / "out"), code, noun)
        assert not (tmp_path / "out").exists()


def test_export_holds_what_the_folder_holds(dataset, tmp_path):
    out = tmp_path / "new" / "small.json"
    good("recipe", dataset, "--out", out)
    assert good("recipe", dataset).stdout_bytes == out.read_bytes()
    assert xxhash.xxh3_128_hexdigest(out.read_bytes()) == "43b13104fd33e41a14791d5ec779f0c3"  # of the first release
    manifest, portable = load_manifest(dataset), read_portable(out)
    assert (portable.recipe, portable.recipe_digest) == (manifest.recipe, manifest.recipe_digest)
    assert portable.digest == manifest.content_digest()
    stored = read_systems(dataset / SYSTEMS)
    assert [system.tobytes() for system in portable.systems] == [system.tobytes() for system in stored]
    assert portable.differing_shards(manifest.splits) == []
    first, second = manifest.splits["train"]
    other = {"train": (first, replace(second, content_digest="0")), "val": (replace(first, name="val-000000.tar"),)}
    assert portable.differing_shards(other) == [second.name, "val-000000.tar"]
    assert portable.differing_shards({"train": (first,)}) == [second.name]


@pytest.mark.parametrize("shape", [(3, 2, 3), (5, 7), (1, 12)])
def test_every_float_survives(dataset, shape):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**64, (200, *shape), dtype=np.uint64).view(np.float64)  # of all magnitudes
    systems = list(np.where(np.isfinite(bits), bits, -0.0))
    portable = parse(seal({**exported(dataset), "systems": [system.tolist() for system in systems]}))
    assert [system.tobytes() for system in portable.systems] == [system.tobytes() for system in systems]
    assert all(system.dtype == np.float64 and system.shape == shape for system in portable.systems)


def test_portable_recipe_may_replace_the_folders_own(dataset):
    (dataset / RECIPE).write_bytes(b"")  # as a shell does for 'fractalshards recipe . > recipe.json'
    (dataset / RECIPE).write_bytes(good("recipe", dataset).stdout_bytes)
    assert is_sound(dataset)


def test_export_refuses_folders_without_a_true_recipe(dataset):
    info = json.loads((dataset / INFO).read_text())
    write_json(dataset / INFO, {**info, "recipe": {"kind": "imagenet", "n": 10}})
    assert_refused(run("recipe", dataset), 1, str(dataset))
    write_json(dataset / INFO, info)
    write_systems(dataset / SYSTEMS, [system + 1 for system in read_systems(dataset / SYSTEMS)])
    assert_refused(run("recipe", dataset), 1, str(dataset))
    (dataset / SYSTEMS).unlink()
    assert_refused(run("recipe", dataset), 1, SYSTEMS)


@pytest.mark.parametrize(
    ("path", "value", "noun"),
    [
        ("portable_version", 3, "version 3"),
        ("recipe.n", 11, "recipe digest"),
        ("content_digest", "0" * 32, "content digest"),
        ("systems.0.0.0.0", 0.5, "systems digest"),
        ("systems", [], "systems"),
        ("systems.1.0", [1.0] * 7, "system 1"),
        ("systems.1", [[1.0] * 7] * 1001, "systems"),
        ("systems.1.0.0.0", 10**400, "systems"),
        ("splits.train.filenames.0", "pipe:rm", "pipe:rm"),
        ("splits.train.shard_lengths.0", -1, "shard_lengths"),
        ("splits.train.shard_lengths", [5], "length"),
        ("splits.train.content_digests.0", "0" * 32, "content digest"),
        ("splits", {"../train": {"filenames": [], "shard_lengths": [], "content_digests": []}}, "../train"),
    ],
)
def test_contradictions_are_refused(dataset, path, value, noun):
    data = exported(dataset)
    inner: Any = data
    *way, last = [int(name) if name.isdigit() else name for name in path.split(".")]
    for name in way:
        inner = inner[name]
    inner[last] = value
    with pytest.raises(FractalError, match=rf"\Aportable\.json: .*{noun}.*\Z"):  # one line
        parse(data)


def test_other_files_are_refused(dataset, tmp_path):
    data = exported(dataset)
    for other in ({}, seal({**data, "recipe": {**data["recipe"], "classes": 4}})):
        with pytest.raises(FractalError):
            parse(other)
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(FractalError, match=r"large\.json"):
        read_portable(tmp_path / "large.json")
