"""Recipes of any kind: parameters count as fields, and a changed recipe is told from another one."""

from dataclasses import replace
from pathlib import Path

import pytest

from fractalshards.digest import mapping_digest
from fractalshards.errors import FractalError
from fractalshards.manifest import flat_recipe, load_manifest, recipe_differences, recipe_problems, refuse_other


def test_parameters_are_fields() -> None:
    assert flat_recipe({"n": 1, "params": {"blur": (0.5, 1)}}) == {"n": 1, "blur": [0.5, 1]}
    assert flat_recipe({"params": 1}) == {"params": 1}
    assert flat_recipe({"params": {"params": 1}}) == {"params": 1}


def test_differences() -> None:
    first = {"n": 1, "seed": 0, "params": {"blur": 0.5, "same": [1, 2]}}
    second = {"n": 1, "seed": 1, "params": {"blur": 0.0, "same": (1, 2)}, "new": None}
    assert recipe_differences(first, second) == [("seed", "0", "1"), ("blur", "0.5", "0.0"), ("new", "-", "None")]
    assert recipe_differences(first, first) == []
    assert recipe_differences({"params": 1}, {}) == [("params", "1", "-")]


def test_another_recipe_is_refused_in_a_line_of_bounded_length() -> None:
    refuse_other(Path("here"), {"n": 1, "params": {"a": [1]}}, {"n": 1, "params": {"a": (1,)}})
    with pytest.raises(FractalError, match=r"here: holds another dataset \(a 7+… there, - here\)") as error:
        refuse_other(Path("here"), {"n": 1, "params": {"a": "7" * 10**6}}, {"n": 1, "params": {}})
    assert len(str(error.value)) < 200


def test_problems(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    recipe, changed = manifest.recipe, {**manifest.recipe, "n": 11}
    assert list(recipe_problems(recipe, mapping_digest(recipe), manifest)) == []
    assert list(recipe_problems(changed, mapping_digest(changed))) == []
    assert list(recipe_problems(changed, mapping_digest(changed), manifest)) == ["recipe and manifest disagree"]
    assert list(recipe_problems(changed, mapping_digest(recipe), replace(manifest, recipe=changed))) == [
        "recipe digest differs: the recipe was changed"
    ]
