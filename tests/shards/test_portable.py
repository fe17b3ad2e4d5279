"""The portable recipe: exact through the file, and refused in one line when anything in it does not fit the rest."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from fractalshards.cli import main
from fractalshards.digest import mapping_digest, systems_digest
from fractalshards.errors import FractalError
from fractalshards.manifest import INFO, RECIPE, SYSTEMS, load_manifest
from fractalshards.portable import PortableRecipe, export_recipe, read_portable
from fractalshards.storage import write_json
from fractalshards.systems import read_systems, write_systems


def recipe(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["recipe", *arguments])


def exported(dataset: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(export_recipe(load_manifest(dataset)))
    return data


def read(tmp_path: Path, data: object) -> PortableRecipe:
    path = tmp_path / "portable.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return read_portable(path)


def seal(data: dict[str, Any]) -> dict[str, Any]:
    """Digests made to fit, as somebody would who wants a changed file to be taken."""
    systems = [np.array(system, np.float64) for system in data["systems"]]
    data["recipe"]["systems_digest"] = systems_digest(systems)
    data["recipe_digest"] = mapping_digest(data["recipe"])
    return data


def test_it_holds_what_the_folder_holds(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "small.json"
    result = recipe(str(dataset), "--out", str(out))
    assert result.exit_code == 0
    assert result.stdout.endswith(f"next: fractalgen build --recipe {out}\n")
    manifest, portable = load_manifest(dataset), read_portable(out)
    assert (portable.recipe, portable.recipe_digest) == (manifest.recipe, manifest.recipe_digest)
    assert (portable.label_type, portable.content_digest()) == ("single", manifest.content_digest())
    shards = manifest.splits["train"]
    assert [(one.name, one.samples, one.content_digest) for one in portable.splits["train"]] == [
        (shard.name, shard.samples, shard.content_digest) for shard in shards
    ]
    stored = read_systems(dataset / SYSTEMS)
    assert [system.tobytes() for system in portable.systems] == [system.tobytes() for system in stored]
    assert recipe(str(dataset)).stdout_bytes == out.read_bytes()


@pytest.mark.parametrize("shape", [(3, 2, 3), (5, 7)])
def test_every_float_survives(dataset: Path, tmp_path: Path, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**64, (200, *shape), dtype=np.uint64).view(np.float64)  # of all magnitudes
    systems = list(np.where(np.isfinite(bits), bits, -0.0))
    data = {**exported(dataset), "systems": [system.tolist() for system in systems]}
    portable = read(tmp_path, seal(data))
    assert [system.tobytes() for system in portable.systems] == [system.tobytes() for system in systems]
    assert all(system.dtype == np.float64 and system.shape == shape for system in portable.systems)


def test_a_built_dataset_is_compared_with_the_promise(dataset: Path, tmp_path: Path) -> None:
    portable = read(tmp_path, exported(dataset))
    splits = load_manifest(dataset).splits
    assert portable.broken_promises(splits) == []
    first, second = splits["train"]
    assert portable.broken_promises({"train": (first, replace(second, content_digest="0"))}) == [second.name]
    assert portable.broken_promises({"train": (first,)}) == [second.name]
    assert portable.broken_promises({"train": (first, second), "val": (replace(first, name="val-000000.tar"),)}) == [
        "val-000000.tar"
    ]


def test_a_shell_that_redirects_onto_the_folders_own_recipe_does_no_harm(dataset: Path) -> None:
    program = "import sys; from fractalshards.cli import main; main(sys.argv[1:])"
    command = f"{sys.executable} -c '{program}' recipe . > {RECIPE}"
    subprocess.run(["sh", "-c", command], cwd=dataset, check=True)
    assert read_portable(dataset / RECIPE).recipe_digest == load_manifest(dataset).recipe_digest
    assert CliRunner().invoke(main, ["verify", str(dataset), "--workers", "1"]).exit_code == 0


def test_what_was_not_rendered_has_no_recipe(dataset: Path) -> None:
    info = json.loads((dataset / INFO).read_text())
    write_json(dataset / INFO, {**info, "recipe": {"kind": "imagenet", "n": 10}})
    result = recipe(str(dataset))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"error: {dataset}: its images were not rendered from systems, so no recipe can make them again; share the "
        f"files with 'fractalshards push {dataset} URL' and 'fractalshards pull URL DIR'\n"
    )


def test_an_unfinished_or_changed_folder_has_no_recipe(dataset: Path) -> None:
    write_systems(dataset / SYSTEMS, [system + 1 for system in read_systems(dataset / SYSTEMS)])
    assert "systems digest differs" in recipe(str(dataset)).stderr
    (dataset / SYSTEMS).unlink()
    assert f"{dataset / SYSTEMS}: No such file" in recipe(str(dataset)).stderr
    (dataset / INFO).unlink()
    result = recipe(str(dataset))
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "not a finished dataset" in result.stderr


def set_at(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        inner: Any = data
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("portable_version", to=2), "portable recipe version 2, not 1; upgrade fractalpretrain"),
        (set_at("recipe", "n", to=11), "recipe digest differs"),
        (set_at("recipe_digest", to="0" * 32), "recipe digest differs"),
        (set_at("recipe", to=[]), "recipe is missing or not an object"),
        (set_at("label_type", to="triple"), "label_type 'triple' is not known"),
        (set_at("systems", 0, 0, 0, 0, to=0.5), "systems digest differs"),
        (set_at("systems", to=[]), "0 systems"),
        (set_at("systems", to={}), "systems is missing or not a list"),
        (set_at("systems", 1, to=[]), "system 1 is not a list of maps of 2 x 3 or 7 finite numbers"),
        (set_at("systems", 1, 0, 0, to=[1.0, 2.0]), "system 1 is not a list of maps"),
        (set_at("systems", 1, 0, to=[1.0] * 7), "system 1 is not a list of maps"),
        (set_at("systems", 1, 0, 0, 0, to="1.0"), "system 1 is not a list of maps"),
        (set_at("systems", 1, 0, 0, 0, to=True), "system 1 is not a list of maps"),
        (set_at("systems", 1, 0, 0, 0, to=10**400), "system 1 is not a list of maps"),
        (set_at("systems", 1, to=[[1.0] * 7] * 1001), "system 1 is not a list of maps"),
        (set_at("splits", "train", "filenames", 0, to="pipe:rm"), "'pipe:rm' is not a plain file name"),
        (set_at("splits", "train", "filenames", 1, to="train-000000.tar"), "a shard is named twice"),
        (set_at("splits", "train", "shard_lengths", 0, to=-1), "shard_lengths is not a count"),
        (set_at("splits", "train", "shard_lengths", to=[5]), "the lists of a split differ in length"),
        (set_at("splits", "train", "content_digests", 0, to="0" * 32), "content digest differs"),
        (set_at("splits", "train", "content_digests", 0, to="../x"), "content digest is not 32 hexadecimal digits"),
        (set_at("splits", to={"../train": {}}), "'../train' is not a plain file name"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    dataset: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    data = exported(dataset)
    change(data)
    with pytest.raises(FractalError) as error:
        read(tmp_path, data)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert str(tmp_path / "portable.json") in str(error.value)


def test_infinity_and_numbers_that_become_it_are_refused(dataset: Path, tmp_path: Path) -> None:
    for number in ("Infinity", "NaN", "1e999"):
        for place in ("recipe", "systems"):
            data = exported(dataset)
            if place == "recipe":
                data["recipe"]["n"] = "HERE"
            else:
                data["systems"][0][0][0][0] = "HERE"
            with pytest.raises(FractalError):
                read(tmp_path, json.dumps(data).replace('"HERE"', number))


def test_another_number_of_classes_than_systems_is_refused(dataset: Path, tmp_path: Path) -> None:
    data = exported(dataset)
    data["recipe"]["classes"] = 4
    with pytest.raises(FractalError, match="3 systems for 4 classes"):
        read(tmp_path, seal(data))


def test_other_files_are_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(FractalError, match="not a portable recipe; make one with 'fractalshards recipe DIR"):
        read_portable(dataset / RECIPE)
    with pytest.raises(FractalError, match="not valid JSON"):
        read(tmp_path, "[" * 100_000)
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(FractalError, match="larger than 16 MiB"):
        read_portable(tmp_path / "large.json")


def test_a_thousand_classes_take_some_hundred_kilobytes(dataset: Path) -> None:
    systems = [np.round(np.random.default_rng(0).uniform(-1, 1, (3, 2, 3)) * 2**24) / 2**24] * 1000
    write_systems(dataset / SYSTEMS, systems)
    manifest = load_manifest(dataset)
    fitting = {**manifest.recipe, "systems_digest": systems_digest(systems)}
    text = export_recipe(replace(manifest, recipe=fitting, recipe_digest=mapping_digest(fitting)))
    assert 200_000 < len(text) < 600_000
