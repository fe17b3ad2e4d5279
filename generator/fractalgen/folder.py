"""The folder of a dataset under construction: recipe and systems come first and fix what the folder is."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fractalgen.kinds import find_kind
from fractalgen.limits import MAX_MAPS
from fractalgen.recipe import Recipe, parse_recipe
from fractalgen.render import draw_systems
from fractalshards.claim import claim_folder, refuse_other, stored_recipe
from fractalshards.digest import systems_digest
from fractalshards.errors import FractalError
from fractalshards.fields import Fields
from fractalshards.names import INFO, RECIPE, SYSTEMS
from fractalshards.recipes import recipe_problems
from fractalshards.systems import Systems, read_systems, write_systems


def settle(folder: Path, recipe: Recipe, given: Systems | None = None) -> tuple[Recipe, Systems]:
    """The recipe bound to its systems: those given, those the folder stores, or newly drawn ones. Writes nothing.

    Raises:
        FractalError: if the folder holds another recipe, damaged systems, or something that is no dataset.
        OSError: if it cannot be read.
    """
    if given is not None:
        _check_systems(recipe, given, "the systems that were given")
    if (found := stored_recipe(folder)) is not None:
        return _settled(folder, found, recipe, given)
    systems = draw_systems(recipe) if given is None else given
    return recipe.with_systems(systems), systems


def claim(folder: Path, recipe: Recipe, systems: Systems) -> None:
    """Write the recipe and then its systems into a new folder; one that has them is left as it is.

    Of two builds that begin at once in one folder, one publishes its recipe; the other finds it there.

    Raises:
        FractalError: if the folder holds another recipe by now.
        OSError: if it cannot be written.
    """
    claim_folder(folder, recipe.to_json())
    _settled(folder, recipe.to_json(), recipe, systems)
    if not (folder / SYSTEMS).exists():
        write_systems(folder / SYSTEMS, systems)


def restore(folder: Path) -> tuple[Recipe, Systems]:
    """Recipe and systems of a folder in which either file may be damaged or missing; such a file is written again.

    The recipe is in the manifest too, and systems that were not given to the build can be drawn again.

    Raises:
        FractalError: if neither file has a sound recipe of this software's version, or the systems cannot be had.
        OSError: if a file cannot be read or written.
    """
    recipe = _sound_recipe(folder)
    systems = _sound_systems(folder / SYSTEMS, recipe)
    _check_systems(recipe, systems, str(folder / SYSTEMS))
    claim(folder, recipe, systems)
    return recipe, systems


def _sound_recipe(folder: Path) -> Recipe:
    if not any((folder / name).exists() for name in (RECIPE, INFO)):
        raise FractalError(f"{folder}: neither {RECIPE} nor {INFO} is there, so nothing says what to build")
    try:
        return _read_recipe(folder / RECIPE)
    except (FractalError, FileNotFoundError):
        recipe = _read_recipe(folder / INFO)
        (folder / RECIPE).unlink(missing_ok=True)
        return recipe


def _read_recipe(path: Path) -> Recipe:
    fields = Fields.read(path)
    recipe = parse_recipe(fields.mapping("recipe"), str(path))
    for problem in recipe_problems(recipe.to_json(), fields.text("recipe_digest")):
        raise FractalError(f"{path}: {problem}; fetch it again")
    return recipe


def _sound_systems(path: Path, recipe: Recipe) -> Systems:
    with suppress(FractalError, FileNotFoundError):
        stored = read_systems(path)
        if systems_digest(stored) == recipe.systems_digest:
            return stored
    drawn = draw_systems(recipe)
    if systems_digest(drawn) != recipe.systems_digest:
        raise FractalError(f"{path}: damaged or missing, and not what this software draws; fetch it again")
    path.unlink(missing_ok=True)
    return drawn


def _check_systems(recipe: Recipe, systems: Systems, where: str) -> None:
    """Refuse systems that the recipe's kind cannot render: they may come from elsewhere."""
    shape = find_kind(recipe.kind).map_shape
    fitting = all(system.shape[1:] == shape and 1 <= len(system) <= MAX_MAPS for system in systems)
    if len(systems) != recipe.classes or not fitting:
        raise FractalError(
            f"{where}: not {recipe.classes} systems of 1 to {MAX_MAPS} maps of shape {shape}, as kind {recipe.kind} "
            "renders them; check the file"
        )


def _settled(folder: Path, found: dict[str, Any], recipe: Recipe, given: Systems | None) -> tuple[Recipe, Systems]:
    bound = recipe.with_systems(given) if given else replace(recipe, systems_digest=str(found.get("systems_digest")))
    refuse_other(folder, found, bound.to_json())
    stored = folder / SYSTEMS
    systems = read_systems(stored) if stored.exists() else given or draw_systems(recipe)
    _check_systems(bound, systems, str(stored))
    if systems_digest(systems) != bound.systems_digest:
        raise FractalError(
            f"{stored}: not the systems that {RECIPE} names, or missing; restore it, give --categories or --from-csv "
            "as in the first build, or use a new folder"
        )
    return bound, systems
