"""``recipe.json``: which dataset a folder is for, and how the recipes of two datasets differ."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from fractalshards.digest import mapping_digest
from fractalshards.errors import FractalError
from fractalshards.manifest import RECIPE, Manifest
from fractalshards.storage import read_json, write_json

_MAX_TEXT = 60  # characters of a value


class RecipeFile(msgspec.Struct, frozen=True):
    """The content of ``recipe.json``."""

    recipe: dict[str, Any]
    recipe_digest: str


def stored_recipe(folder: Path) -> dict[str, Any] | None:
    """Return the recipe of a folder, None if it is empty or missing; raise FractalError if it holds something else."""
    present = [path.name for path in folder.iterdir()] if folder.exists() else []
    if RECIPE in present:
        return read_json(folder / RECIPE, RecipeFile).recipe
    others = [name for name in present if not name.startswith(".")]
    if others:
        raise FractalError(f"{folder}: holds {others[0]!r} but no {RECIPE}; choose an empty or new folder")
    return None


def claim_folder(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Write the recipe into a folder that has none; raise FractalError if it has another one by then.

    If two builds start in a folder at once, one writes its recipe and the other finds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / RECIPE).exists():
        with suppress(FileExistsError):
            description = {"recipe": dict(recipe), "recipe_digest": mapping_digest(recipe)}
            write_json(folder / RECIPE, description, indent=1, exclusive=True)
    refuse_other(folder, read_json(folder / RECIPE, RecipeFile).recipe, recipe)


def refuse_other(folder: Path, found: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Raise a FractalError that names the differences, e.g. ``seed 0 there, 1 here``, if the recipes differ."""
    if differences := recipe_differences(found, recipe):
        other = ", ".join(f"{name} {there} there, {here} here" for name, there, here in differences)
        raise FractalError(f"{folder}: holds another dataset ({other}); choose another folder or the same options")


def recipe_differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return name and both values of all fields and parameters in which recipes differ; ``-`` stands for no value."""
    one, other = flat_recipe(first), flat_recipe(second)
    names = [name for name in {**one, **other} if name not in one or name not in other or one[name] != other[name]]
    return [(name, _show(one, name), _show(other, name)) for name in names]


def flat_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe and its parameters in one mapping, with tuples as lists, as in JSON."""
    params = recipe.get("params")
    if isinstance(params, dict):
        recipe = {**{name: value for name, value in recipe.items() if name != "params"}, **params}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in recipe.items()}


def recipe_problems(recipe: Mapping[str, Any], digest: str, manifest: Manifest | None = None) -> Iterator[str]:
    """Yield what is wrong with a recipe and its digest, which must be those of ``manifest`` if given."""
    if manifest and (recipe != manifest.recipe or digest != manifest.recipe_digest):
        yield "recipe and manifest disagree"
    if mapping_digest(recipe) != digest:
        yield "recipe digest differs: the recipe was changed"


def _show(recipe: Mapping[str, Any], name: str) -> str:
    text = str(recipe[name]) if name in recipe else "-"
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"
