"""Recipes refuse what makes no sense, in one line, and their digest sees every field."""

import json
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from fractalgen import Recipe, draw_systems, make_recipe
from fractalgen.recipe import parse_recipe
from fractalshards.digest import mapping_digest
from fractalshards.errors import FractalError, UsageError


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "singel"}, "did you mean 'single'"),
        ({"n": 0}, "n is "),
        ({"n": -5}, "n is "),
        ({"n": 1e3}, "n is 1000.0: expected an integer"),
        ({"n": 999}, "fewer images than the 1000 classes"),
        ({"n": 2 * 10**9}, "1,000,000,000"),
        ({"val": -1}, "val is -1"),
        ({"classes": 0}, "classes is 0"),
        ({"n": 10**6, "shard_size": 1}, "shards are too many"),
        ({"size": 15}, "size is 15"),
        ({"size": 4097}, "size is 4097"),
        ({"points": 0}, "points is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"overrides": {"blur": "1"}}, "unknown parameter 'blur', did you mean 'blur_"),
        ({"overrides": {"blur_probability": "often"}}, "expected a number"),
        ({"overrides": {"blur_probability": "1.5"}}, "blur_probability is 1.5"),
        ({"overrides": {"blur_probability": "nan"}}, "finite"),
        ({"overrides": {"maps": "2,3,4"}}, "expected one value, or 2"),
        ({"overrides": {"maps": "4,2"}}, "maps is 4,2"),
        ({"overrides": {"maps": "1,2"}}, "maps is 1,2"),
        ({"overrides": {"background": "maybe"}}, "expected true or false"),
    ],
    ids=str,
)
def test_make_recipe_refuses_nonsense(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        make_recipe(**{"kind": "single", "n": 1000, **changes})
    assert "\n" not in str(caught.value)


def test_make_recipe_has_the_published_defaults() -> None:
    recipe = make_recipe("single", 1_000_000)
    assert (recipe.classes, recipe.size, recipe.points, recipe.shard_size) == (1000, 224, 100_000, 1000)
    assert asdict(recipe.params) == {
        "maps": (2, 4),
        "sigma_factor": (5.0, 6.0),
        "jitter": (0.8, 1.1),
        "window_shift": 0.2,
        "window_scale": (0.5, 2.0),
        "patch": True,
        "flips": True,
        "color": True,
        "saturation": (0.3, 1.0),
        "value": (0.5, 1.0),
        "background": True,
        "decay": (0.4, 0.8),
        "blur_probability": 0.5,
        "blur_sigma": (0.5, 1.0),
    }


def test_recipe_digest_covers_every_field() -> None:
    recipe = make_recipe("single", 100, classes=5)
    variants = [
        recipe,
        *(replace(recipe, **{name: getattr(recipe, name) + 1}) for name in ("n", "val", "classes", "size", "points")),
        *(replace(recipe, **{name: getattr(recipe, name) + 1}) for name in ("seed", "shard_size")),
        make_recipe("single", 100, classes=5, overrides={"blur_probability": "0.25"}),
        make_recipe("single", 100, classes=5, overrides={"maps": "2,5"}),
        recipe.with_systems(draw_systems(recipe)),
        recipe.with_systems(draw_systems(replace(recipe, seed=1))),
    ]
    assert len({variant.digest() for variant in variants}) == len(variants)
    assert len(set(variants)) == len(variants)
    assert make_recipe("single", 100, classes=5).digest() == recipe.digest()


def test_recipe_takes_the_parameters_of_its_kind() -> None:
    with pytest.raises(UsageError, match="takes SingleParams, not str"):
        Recipe("single", 10, 0, 2, 32, 100, 0, 10, params="x")


def test_make_recipe_takes_numpy_integers_and_values() -> None:
    text = make_recipe("single", 1000, seed=3, overrides={"maps": "2,3", "blur_probability": "0"})
    values = make_recipe("single", np.int64(1000), seed=np.uint8(3), overrides={"maps": (2, 3), "blur_probability": 0})
    assert text == values
    assert text.digest() == values.digest()


@pytest.mark.parametrize("kind", ["fractaldb", "single", "multi"])
def test_parse_recipe_is_the_inverse_of_to_json(kind: str) -> None:
    recipe = make_recipe(kind, 100, val=10, classes=5, seed=2**60)
    recipe = recipe.with_systems(draw_systems(recipe))
    assert parse_recipe(json.loads(json.dumps(recipe.to_json())), recipe.digest(), "a test") == recipe


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 1}, "recipe version 1"),
        ({"version": "x"}, "recipe version x"),
        ({"kind": "sinlge"}, "'sinlge'"),
        ({"kind": ["single"]}, "kind"),
        ({"n": -1}, "n is -1"),
        ({"n": 10**15}, "1,000,000,000"),
        ({"params": []}, "params"),
        ({"params": {"blur": 1}}, "unknown parameter 'blur'"),
        ({"params": {"maps": {"a": [1]}}}, "maps="),
        ({"params": {}}, "recipe digest differs"),
        ({"more": 1}, "recipe digest differs"),
    ],
    ids=str,
)
def test_parse_recipe_refuses_other_json(changes: dict[str, Any], words: str) -> None:
    data = json.loads(json.dumps(make_recipe("single", 100, classes=5).to_json())) | changes
    with pytest.raises(FractalError, match=words) as caught:
        parse_recipe(data, mapping_digest(data), "recipe.json")
    assert not isinstance(caught.value, UsageError)
    assert str(caught.value).startswith("recipe.json")
    assert "\n" not in str(caught.value)
