"""Portable recipes: one small JSON file from which a dataset is rendered, by ``build --recipe`` or while training.

It contains the recipe and the systems; in version 1, which describes a dataset that was built, also the content digest
of every shard, with which shards that are rendered again are compared.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from fractalshards.digest import mapping_digest, systems_digest
from fractalshards.errors import FractalError, UsageError
from fractalshards.manifest import MAX_CLASSES, SYSTEMS, Count, Manifest, Shard, check_names
from fractalshards.recipe_file import recipe_problems
from fractalshards.sample import LabelType
from fractalshards.storage import MAX_JSON_BYTES, parse_json, read_bounded
from fractalshards.systems import MAP_SHAPES, Systems, read_systems

_BUILT = 1  # version of the portable recipe of a dataset that was built
_PLANNED = 2  # of one that was not, without what only a build knows
_ADVICE = "the file is damaged or was changed; ask for the file again"

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
    """A checked portable recipe.

    Attributes:
        recipe: as in ``recipe.json`` and the manifest; kind, sizes and parameters are not checked.
        systems: one finite float64 array per class, see ``systems.npz``; they match the recipe's digest.
        shards: content digest of each shard, by file name, by split; None if the dataset has not been built.
    """

    recipe: Mapping[str, Any]
    recipe_digest: str
    label_type: LabelType
    systems: tuple[npt.NDArray[np.float64], ...]
    shards: Mapping[str, Mapping[str, str]] | None

    def content_digest(self) -> str | None:
        """Return the content digest of the dataset, see ``Manifest.content_digest``; None if it is not known."""
        if self.shards is None:
            return None
        return mapping_digest({split: list(digests.values()) for split, digests in self.shards.items()})

    @property
    def digest(self) -> str:
        """Identifies the dataset: its content digest if it is known, else the digest of its recipe."""
        return self.content_digest() or self.recipe_digest

    def differing_shards(self, splits: Mapping[str, tuple[Shard, ...]]) -> list[str]:
        """Name the shards whose content differs in a built dataset, or that only one of the two has.

        Nothing differs from a recipe that does not know the content of its shards.
        """
        if self.shards is None:
            return []
        expected = {name: digest for digests in self.shards.values() for name, digest in digests.items()}
        found = {shard.name: shard.content_digest for shards in splits.values() for shard in shards}
        return sorted(name for name in expected | found if expected.get(name) != found.get(name))


def export_recipe(manifest: Manifest) -> bytes:
    """Make the portable recipe of a dataset, as JSON text; raises FractalError if its images were not rendered."""
    folder = manifest.folder
    instead = f"share the files with 'fractalshards push {folder} URL' and 'fractalshards pull URL DIR'"
    if not isinstance(manifest.recipe.get("systems_digest"), str):
        raise FractalError(f"{folder}: its images were not rendered from systems, so it has no recipe; {instead}")
    built = {
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
    recipe = manifest.recipe, manifest.recipe_digest, manifest.label_type
    text = _format(_BUILT, *recipe, built, read_systems(folder / SYSTEMS))
    if text is None:
        raise FractalError(f"{folder}: its recipe would be larger than {MAX_JSON_BYTES >> 20} MiB; {instead}")
    parse_portable(text, str(folder))  # refuse a folder that was tampered with here, not where the file arrives
    return text


def plan_portable(recipe: Mapping[str, Any], label_type: LabelType, systems: Systems) -> bytes:
    """Make the portable recipe of a dataset that has not been built, as JSON text; see ``parse_portable``."""
    text = _format(_PLANNED, recipe, mapping_digest(recipe), label_type, {}, systems)
    if text is None:
        raise UsageError(f"a recipe of {len(systems):,} classes is larger than {MAX_JSON_BYTES >> 20} MiB; use fewer")
    return text


def read_portable(path: Path) -> PortableRecipe:
    """Read a portable recipe; raises FractalError if it is malformed or contradicts itself."""
    if path.is_dir():
        raise FractalError(f"{path}: is a folder; give the file that 'fractalshards recipe {path}' writes")
    return parse_portable(read_bounded(path, MAX_JSON_BYTES), str(path))


def parse_portable(text: bytes, where: str) -> PortableRecipe:
    """Check the text of a portable recipe; ``where`` names it in errors. See ``read_portable``."""
    version = parse_json(text, _Version, where).portable_version
    if version is None:
        raise FractalError(
            f"{where}: not a portable recipe; make one with 'fractalgen recipe', or 'fractalshards recipe DIR'"
        )
    if version not in (_BUILT, _PLANNED):
        raise FractalError(
            f"{where}: portable recipe version {version}, expected {_BUILT} or {_PLANNED}; upgrade fractalpretrain"
        )
    file = parse_json(text, _Built if version == _BUILT else _Planned, where)
    for problem in recipe_problems(file.recipe, file.recipe_digest):
        raise FractalError(f"{where}: {problem}; {_ADVICE}")
    systems = tuple(_to_array(system, f"{where}: system {index}") for index, system in enumerate(file.systems))
    if systems_digest(systems) != file.recipe.get("systems_digest"):
        raise FractalError(f"{where}: systems digest differs: the systems were changed; {_ADVICE}")
    if (classes := file.recipe.get("classes", len(systems))) != len(systems):
        raise FractalError(f"{where}: {len(systems)} systems for {str(classes)[:20]} classes; {_ADVICE}")
    portable = PortableRecipe(
        recipe=file.recipe,
        recipe_digest=file.recipe_digest,
        label_type=file.label_type,
        systems=systems,
        shards=_collect_digests(file.splits, where) if isinstance(file, _Built) else None,
    )
    if isinstance(file, _Built) and portable.content_digest() != file.content_digest:
        raise FractalError(f"{where}: content digest differs: the digests of shards were changed; {_ADVICE}")
    return portable


def _format(
    version: int,
    recipe: Mapping[str, Any],
    recipe_digest: str,
    label_type: LabelType,
    built: Mapping[str, Any],
    systems: Systems,
) -> bytes | None:
    """Lay out the file with one line per system; None if it would be larger than 16 MiB, at some 30,000 classes."""
    if len("0.0,") * sum(system.size for system in systems) > MAX_JSON_BYTES:
        return None
    head = {
        "portable_version": version,
        "recipe": recipe,
        "recipe_digest": recipe_digest,
        "label_type": label_type,
        **built,
    }
    lines = ",\n".join(f"  {json.dumps(system.tolist(), separators=(',', ':'))}" for system in systems)
    text = f'{json.dumps(head, indent=1)[:-2]},\n "systems": [\n{lines}\n ]\n}}\n'.encode()
    return text if len(text) <= MAX_JSON_BYTES else None


def _to_array(system: _System, where: str) -> npt.NDArray[np.float64]:
    try:
        array = np.array(system, np.float64)
    except ValueError:  # maps of different lengths
        array = np.empty(0)
    if array.shape[1:] not in MAP_SHAPES:
        raise FractalError(f"{where}: expected maps of 2 x 3, 7 or 12 numbers; {_ADVICE}")
    return array


def _collect_digests(splits: Mapping[str, _Split], where: str) -> dict[str, dict[str, str]]:
    check_names({name: split.filenames for name, split in splits.items()}, where)
    if any(not len(one.filenames) == len(one.shard_lengths) == len(one.content_digests) for one in splits.values()):
        raise FractalError(f"{where}: the lists of a split differ in length; {_ADVICE}")
    return {name: dict(zip(one.filenames, one.content_digests, strict=True)) for name, one in splits.items()}
