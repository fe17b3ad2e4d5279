"""The recipe of a dataset folder comes first and fixes what the folder is: another recipe is refused."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fractalshards.atomic import write_json
from fractalshards.digest import mapping_digest
from fractalshards.errors import FractalError
from fractalshards.fields import Fields
from fractalshards.names import RECIPE
from fractalshards.recipes import recipe_differences


def stored_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe of a folder; None if the folder is empty or not there, so that it can become any dataset.

    Raises:
        FractalError: if the recipe is damaged, or the folder holds something that is no dataset.
        OSError: if it cannot be read.
    """
    present = [path.name for path in folder.iterdir()] if folder.exists() else []
    if RECIPE in present:
        return Fields.read(folder / RECIPE).mapping("recipe")
    strangers = [name for name in present if not name.startswith(".")]
    if strangers:
        raise FractalError(f"{folder}: holds {strangers[0]!r} but no {RECIPE}; choose an empty or new folder")
    return None


def refuse_other(folder: Path, found: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Raise a FractalError that names the differences, e.g. ``seed 0 there, 1 here``, if two recipes differ."""
    if differences := recipe_differences(found, recipe):
        other = ", ".join(f"{name} {there} there, {here} here" for name, there, here in differences)
        raise FractalError(f"{folder}: holds another dataset ({other}); choose another folder or the same options")


def claim_folder(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Write the recipe into a new folder; one that has it is left as it is.

    Of two builds that begin at once in one folder, one publishes its recipe; the other finds it there.

    Raises:
        FractalError: if the folder holds another recipe by now.
        OSError: if it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / RECIPE).exists():
        with suppress(FileExistsError):
            description = {"recipe": dict(recipe), "recipe_digest": mapping_digest(recipe)}
            write_json(folder / RECIPE, description, indent=1, exclusive=True)
    refuse_other(folder, stored_recipe(folder) or {}, recipe)
