"""Portable recipes: one small JSON file from which ``fractalgen build --recipe`` renders a dataset again.

It contains the recipe, the systems, and the content digest of every shard, with which the rendered shards are compared.
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
from fractalshards.errors import FractalError
from fractalshards.manifest import MAX_CLASSES, SYSTEMS, Count, Manifest, Shard, check_names
from fractalshards.recipe_file import recipe_problems
from fractalshards.sample import LabelType
from fractalshards.storage import MAX_JSON_BYTES, parse_json, read_bounded
from fractalshards.systems import MAP_SHAPES, read_systems

PORTABLE_VERSION = 1
_ADVICE = "the file is damaged or was changed; ask for the file again"

_Row = tuple[float, float, float]
_Map = Annotated[list[_Row | float], Meta(min_length=2, max_length=7)]  # 2 x 3 or 7 numbers
_System = Annotated[list[_Map], Meta(min_length=1, max_length=1000)]
_Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]


class _Version(msgspec.Struct):
    portable_version: int | None = None


class _Split(msgspec.Struct):
    filenames: list[str]
    shard_lengths: list[Count]
    content_digests: list[_Digest]


class _File(msgspec.Struct):
    recipe: dict[str, Any]
    recipe_digest: str
    label_type: LabelType
    content_digest: str
    splits: dict[str, _Split]
    systems: Annotated[list[_System], Meta(min_length=1, max_length=MAX_CLASSES)]


@dataclass(frozen=True)
class PortableRecipe:
    """A checked portable recipe.

    Attributes:
        recipe: as in ``recipe.json`` and the manifest; kind, sizes and parameters are not checked.
        systems: one finite float64 array per class, (maps, 2, 3) or (maps, 7); they match the recipe's digest.
        shards: content digest of each shard, by file name, by split.
    """

    recipe: Mapping[str, Any]
    recipe_digest: str
    label_type: LabelType
    systems: tuple[npt.NDArray[np.float64], ...]
    shards: Mapping[str, Mapping[str, str]]

    def content_digest(self) -> str:
        """Return the content digest of the dataset; see ``Manifest.content_digest``."""
        return mapping_digest({split: list(digests.values()) for split, digests in self.shards.items()})

    def differing_shards(self, splits: Mapping[str, tuple[Shard, ...]]) -> list[str]:
        """Name the shards whose content differs in a built dataset, or that only one of the two has."""
        expected = {name: digest for digests in self.shards.values() for name, digest in digests.items()}
        found = {shard.name: shard.content_digest for shards in splits.values() for shard in shards}
        return sorted(name for name in expected | found if expected.get(name) != found.get(name))


def export_recipe(manifest: Manifest) -> bytes:
    """Make the portable recipe of a rendered dataset, as JSON text.

    Raises:
        FractalError: if its images were not rendered from systems, the recipe would be larger than 16 MiB, or the
            files in the folder contradict each other.
    """
    folder = manifest.folder
    instead = f"share the files with 'fractalshards push {folder} URL' and 'fractalshards pull URL DIR'"
    if not isinstance(manifest.recipe.get("systems_digest"), str):
        raise FractalError(f"{folder}: its images were not rendered from systems, so it has no recipe; {instead}")
    systems = read_systems(folder / SYSTEMS)
    shortest = len("0.0,") * sum(system.size for system in systems)
    if shortest > MAX_JSON_BYTES or len(text := _format(manifest, systems)) > MAX_JSON_BYTES:  # some 30,000 classes
        raise FractalError(f"{folder}: its recipe would be larger than {MAX_JSON_BYTES >> 20} MiB; {instead}")
    parse_portable(text, str(folder))  # refuse a folder that was tampered with here, not where the file arrives
    return text


def read_portable(path: Path) -> PortableRecipe:
    """Read and check a portable recipe.

    Raises:
        FractalError: if it is malformed or contradicts itself.
    """
    return parse_portable(read_bounded(path, MAX_JSON_BYTES), str(path))


def parse_portable(text: bytes, where: str) -> PortableRecipe:
    """Check the text of a portable recipe; ``where`` names it in errors. See ``read_portable``."""
    version = parse_json(text, _Version, where).portable_version
    if version is None:
        raise FractalError(f"{where}: not a portable recipe; make one with 'fractalshards recipe DIR > recipe.json'")
    if version != PORTABLE_VERSION:
        raise FractalError(
            f"{where}: portable recipe version {version}, expected {PORTABLE_VERSION}; upgrade fractalpretrain"
        )
    file = parse_json(text, _File, where)
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
        shards=_collect_digests(file.splits, where),
    )
    if portable.content_digest() != file.content_digest:
        raise FractalError(f"{where}: content digest differs: the digests of shards were changed; {_ADVICE}")
    return portable


def _format(manifest: Manifest, systems: tuple[npt.NDArray[np.float64], ...]) -> bytes:
    """Lay out the file with one line per system."""
    head = {
        "portable_version": PORTABLE_VERSION,
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
    lines = ",\n".join(f"  {json.dumps(system.tolist(), separators=(',', ':'))}" for system in systems)
    return f'{json.dumps(head, indent=1)[:-2]},\n "systems": [\n{lines}\n ]\n}}\n'.encode()


def _to_array(system: _System, where: str) -> npt.NDArray[np.float64]:
    try:
        array = np.array(system, np.float64)
    except ValueError:  # maps of different lengths
        array = np.empty(0)
    if array.shape[1:] not in MAP_SHAPES:
        raise FractalError(f"{where}: expected maps of 2 x 3 or 7 numbers; {_ADVICE}")
    return array


def _collect_digests(splits: Mapping[str, _Split], where: str) -> dict[str, dict[str, str]]:
    check_names({name: split.filenames for name, split in splits.items()}, where)
    if any(not len(one.filenames) == len(one.shard_lengths) == len(one.content_digests) for one in splits.values()):
        raise FractalError(f"{where}: the lists of a split differ in length; {_ADVICE}")
    return {name: dict(zip(one.filenames, one.content_digests, strict=True)) for name, one in splits.items()}
