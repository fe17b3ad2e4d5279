"""Recipes in files: ``recipe.json``, which says what a folder is for, and portable recipes.

A portable recipe is one small JSON file from which a dataset is rendered, by ``build --recipe`` or while training. It
contains the recipe and the systems; in version 1, which describes a dataset that was built, also the content digest of
every shard, with which shards that are rendered again are compared.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from fractalshards.digest import mapping_digest, systems_digest
from fractalshards.errors import FractalError, UsageError
from fractalshards.manifest import MAX_CLASSES, RECIPE, SYSTEMS, Count, Manifest, Shard, check_names
from fractalshards.sample import LabelType
from fractalshards.storage import MAX_JSON_BYTES, parse_json, read_bounded, read_json, write_json
from fractalshards.systems import MAP_SHAPES, Systems, read_systems

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
    pairs = {name: (one.get(name, "-"), other.get(name, "-")) for name in one | other}
    return [(name, _show(there), _show(here)) for name, (there, here) in pairs.items() if there != here]


def flat_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a recipe and its parameters in one mapping, with tuples as lists, as in JSON."""
    flat = dict(recipe)
    if isinstance(flat.get("params"), dict):
        flat |= flat.pop("params")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}


def recipe_problems(recipe: Mapping[str, Any], digest: str, manifest: Manifest | None = None) -> Iterator[str]:
    """Yield what is wrong with a recipe and its digest, which must be those of ``manifest`` if given."""
    if manifest and (recipe != manifest.recipe or digest != manifest.recipe_digest):
        yield "recipe and manifest disagree"
    if mapping_digest(recipe) != digest:
        yield "recipe digest differs: the recipe was changed"


def _show(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1] + "…"


_BUILT = 1  # version of the portable recipe of a dataset that was built
_PLANNED = 2  # of one that was not, without what only a build knows
_ADVICE = "the file is damaged or was changed; ask for the file again"
_INSTEAD = "share the files with 'fractalshards push DIR URL' and 'fractalshards pull URL DIR'"

_Row = tuple[float, float, float]
_Map = Annotated[list[_Row | float], Meta(min_length=2, max_length=12)]  # 2 x 3, 7 or 12 numbers
_System = Annotated[list[_Map], Meta(min_length=1, max_length=1000)]
_Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]


class _Version(msgspec.Struct):
    portable_version: int | None = None


class _Split(msgspec.Struct):
    filenames: list[str]
    shard_lengths: list[Count]
    content_digests: list[_Digest]


class _Planned(msgspec.Struct):
    recipe: dict[str, Any]
    recipe_digest: str
    label_type: LabelType
    systems: Annotated[list[_System], Meta(min_length=1, max_length=MAX_CLASSES)]


class _Built(_Planned):
    content_digest: str
    splits: dict[str, _Split]


@dataclass(frozen=True)
class PortableRecipe:
    """A portable recipe whose digests have been checked, but not its kind, sizes and parameters."""

    recipe: Mapping[str, Any]  # as in ``recipe.json`` and the manifest
    recipe_digest: str
    systems: tuple[npt.NDArray[np.float64], ...]  # one finite array per class, see ``systems.npz``
    shards: Mapping[str, str] | None  # content digest of each shard by file name; None if there was no build
    digest: str  # identifies the dataset: its content digest if it has been built, else that of its recipe

    def differing_shards(self, splits: Mapping[str, tuple[Shard, ...]]) -> list[str]:
        """Name the shards whose content differs in a built dataset, or that only one of the two has.

        Nothing differs from a recipe that does not know the content of its shards.
        """
        if self.shards is None:
            return []
        found = {shard.name: shard.content_digest for shards in splits.values() for shard in shards}
        return sorted(name for name in {**self.shards, **found} if self.shards.get(name) != found.get(name))


def export_recipe(manifest: Manifest) -> bytes:
    """Make the portable recipe of a dataset, as JSON text; raises FractalError if its images were not rendered."""
    folder = manifest.folder
    if not isinstance(manifest.recipe.get("systems_digest"), str):
        raise FractalError(f"{folder}: its images were not rendered from systems, so it has no recipe; {_INSTEAD}")
    head = {
        "portable_version": _BUILT,
        "recipe": manifest.recipe,
        "recipe_digest": manifest.recipe_digest,
        "label_type": manifest.label_type,
        "content_digest": manifest.content_digest(),
        "splits": {
            name: {
                "filenames": [shard.name for shard in shards],
                "shard_lengths": [shard.samples for shard in shards],
                "content_digests": [shard.content_digest for shard in shards],
            }
            for name, shards in manifest.splits.items()
        },
    }
    text = _format(head, read_systems(folder / SYSTEMS))
    parse_portable(text, str(folder))  # refuse a folder that was tampered with here, not where the file arrives
    return text


def plan_portable(recipe: Mapping[str, Any], label_type: LabelType, systems: Systems) -> bytes:
    """Make the portable recipe of a dataset that has not been built, as JSON text; see ``parse_portable``."""
    head = {
        "portable_version": _PLANNED,
        "recipe": recipe,
        "recipe_digest": mapping_digest(recipe),
        "label_type": label_type,
    }
    return _format(head, systems)


def _format(head: Mapping[str, Any], systems: Systems) -> bytes:
    """Lay out the file with one line per system; raise UsageError if it is larger than 16 MiB, at 30,000 classes."""
    if len("0.0,") * sum(system.size for system in systems) <= MAX_JSON_BYTES:
        lines = ",\n".join(f"  {json.dumps(system.tolist(), separators=(',', ':'))}" for system in systems)
        text = f'{json.dumps(head, indent=1)[:-2]},\n "systems": [\n{lines}\n ]\n}}\n'.encode()
        if len(text) <= MAX_JSON_BYTES:
            return text
    raise UsageError(f"a recipe of {len(systems):,} classes is larger than {MAX_JSON_BYTES >> 20} MiB; {_INSTEAD}")


def read_portable(path: Path) -> PortableRecipe:
    """Read a portable recipe; raises FractalError if it is malformed or contradicts itself."""
    if path.is_dir():
        raise FractalError(f"{path}: is a folder; give the file that 'fractalshards recipe {path}' writes")
    return parse_portable(read_bounded(path, MAX_JSON_BYTES), str(path))


def parse_portable(text: bytes, where: str) -> PortableRecipe:
    """Check the text of a portable recipe; ``where`` names it in errors. See ``read_portable``."""
    version = parse_json(text, _Version, where).portable_version
    if version not in (_BUILT, _PLANNED):
        found = "not a portable recipe" if version is None else f"portable recipe of version {version}"
        advice = "upgrade fractalpretrain, or make one with 'fractalgen recipe' or 'fractalshards recipe DIR'"
        raise FractalError(f"{where}: {found}; {advice}")
    file = parse_json(text, _Built if version == _BUILT else _Planned, where)
    for problem in recipe_problems(file.recipe, file.recipe_digest):
        raise FractalError(f"{where}: {problem}; {_ADVICE}")
    systems = tuple(_to_array(system, f"{where}: system {index}") for index, system in enumerate(file.systems))
    if systems_digest(systems) != file.recipe.get("systems_digest"):
        raise FractalError(f"{where}: systems digest differs: the systems were changed; {_ADVICE}")
    if (classes := file.recipe.get("classes", len(systems))) != len(systems):
        raise FractalError(f"{where}: {len(systems)} systems for {str(classes)[:20]} classes; {_ADVICE}")
    if not isinstance(file, _Built):
        return PortableRecipe(file.recipe, file.recipe_digest, systems, None, file.recipe_digest)
    splits = file.splits
    check_names({name: split.filenames for name, split in splits.items()}, where)
    if any(not len(one.filenames) == len(one.shard_lengths) == len(one.content_digests) for one in splits.values()):
        raise FractalError(f"{where}: the lists of a split differ in length; {_ADVICE}")
    if mapping_digest({name: split.content_digests for name, split in splits.items()}) != file.content_digest:
        raise FractalError(f"{where}: content digest differs: the digests of shards were changed; {_ADVICE}")
    pairs = (zip(one.filenames, one.content_digests, strict=True) for one in splits.values())
    shards = dict(chain.from_iterable(pairs))
    return PortableRecipe(file.recipe, file.recipe_digest, systems, shards, file.content_digest)


def _to_array(system: _System, where: str) -> npt.NDArray[np.float64]:
    try:
        array = np.array(system, np.float64)
    except ValueError:  # maps of different lengths
        array = np.empty(0)
    if array.shape[1:] not in MAP_SHAPES:
        raise FractalError(f"{where}: expected maps of 2 x 3, 7 or 12 numbers; {_ADVICE}")
    return array
