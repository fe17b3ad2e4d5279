"""Recipes of any kind: their fields, in what two of them differ, whether a digest is theirs. Pure functions."""

from collections.abc import Iterator, Mapping
from typing import Any

from fractalshards.digest import mapping_digest
from fractalshards.manifest import Manifest

_MAX_TEXT = 60  # letters of a value


def flat_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a recipe with its parameters beside them; tuples as the lists that JSON makes of them."""
    params = recipe.get("params")
    if isinstance(params, dict):
        recipe = {**{name: value for name, value in recipe.items() if name != "params"}, **params}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in recipe.items()}


def recipe_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Name and both values of the fields, parameters included, in which recipes differ; ``-`` where one has none."""
    one, other = flat_recipe(first), flat_recipe(second)
    names = [name for name in {**one, **other} if name not in one or name not in other or one[name] != other[name]]
    return [(name, _show(one, name), _show(other, name)) for name in names]


def recipe_problems(recipe: Mapping[str, Any], digest: str, manifest: Manifest | None = None) -> Iterator[str]:
    """What is wrong with a recipe and the digest beside it, which are also those of the manifest if one is given."""
    if manifest and (recipe != manifest.recipe or digest != manifest.recipe_digest):
        yield "recipe and manifest disagree"
    if mapping_digest(recipe) != digest:
        yield "recipe digest differs: the recipe was changed"


def _show(recipe: Mapping[str, Any], name: str) -> str:
    text = str(recipe[name]) if name in recipe else "-"
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
