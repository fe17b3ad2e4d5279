"""The manifest and recipes of any kind; what is refused is in ``test_hostile``."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fractalshards.digest import mapping_digest
from fractalshards.errors import FractalError
from fractalshards.manifest import INFO, load_manifest
from fractalshards.reader import index_split
from fractalshards.recipe_file import recipe_differences, recipe_problems, refuse_other


def test_manifest_round_trip(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    assert (manifest.classes, manifest.image_size, manifest.label_type, manifest.class_names) == (3, 16, "single", ())
    assert manifest.samples("train") == 10
    assert manifest.bytes() == sum(path.stat().st_size for path in dataset.glob("*.tar"))
    info = json.loads((dataset / INFO).read_text()) | {"image_size": None, "class_names": ["cat", "dog", "fish"]}
    (dataset / INFO).write_text(json.dumps(info))
    manifest = load_manifest(dataset)
    assert (manifest.image_size, manifest.class_names, manifest.class_ids) == (None, ("cat", "dog", "fish"), ())


def test_index_split_checks_shards(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    with pytest.raises(FractalError, match="no split 'val'; it has train"):
        index_split(manifest, "val")
    shard = dataset / "train-000001.tar"
    with shard.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(FractalError, match=r"train-000001.tar: 1000 bytes instead of"):
        index_split(manifest, "train")
    shard.unlink()
    with pytest.raises(FractalError, match=r"train-000001.tar: missing"):
        index_split(manifest, "train")


def test_recipe_differences() -> None:
    first = {"n": 1, "seed": 0, "params": {"blur": 0.5, "same": [1, 2]}}
    second = {"n": 1, "seed": 1, "params": {"blur": 0.0, "same": (1, 2)}, "new": None}
    assert recipe_differences(first, second) == [("seed", "0", "1"), ("blur", "0.5", "0.0"), ("new", "-", "None")]
    assert recipe_differences(first, first) == []
    assert recipe_differences({"params": 1}, {"params": {"params": 1}}) == []
    assert recipe_differences({"params": 1}, {}) == [("params", "1", "-")]


def test_refuse_other_is_short() -> None:
    refuse_other(Path("here"), {"n": 1, "params": {"a": [1]}}, {"n": 1, "params": {"a": (1,)}})
    with pytest.raises(FractalError, match=r"here: .*\(a 7+… there, - here\)") as error:
        refuse_other(Path("here"), {"n": 1, "params": {"a": "7" * 10**6}}, {"n": 1, "params": {}})
    assert len(str(error.value)) < 200


def test_recipe_problems(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    recipe, changed = manifest.recipe, {**manifest.recipe, "n": 11}
    assert list(recipe_problems(recipe, mapping_digest(recipe), manifest)) == []
    assert list(recipe_problems(changed, mapping_digest(changed))) == []
    assert list(recipe_problems(changed, mapping_digest(changed), manifest)) == ["recipe and manifest disagree"]
    assert list(recipe_problems(changed, mapping_digest(recipe), replace(manifest, recipe=changed))) == [
        "recipe digest differs: the recipe was changed"
    ]
