"""The portable recipe: one small file that says how to render a dataset again, and what must come of it.

It goes in a mail instead of the dataset: recipe, systems, and the content digest of every shard to compare with.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fractalshards.digest import mapping_digest, systems_digest
from fractalshards.errors import FractalError
from fractalshards.fields import MAX_JSON_BYTES, Fields
from fractalshards.manifest import MAX_CLASSES, SYSTEMS, Manifest, Shard, recipe_problems, shard_rows
from fractalshards.sample import LabelType, find_label_type
from fractalshards.systems import MAP_SHAPES, read_systems

PORTABLE_VERSION = 1
_VERSION = "portable_version"
_MAX_MAPS = 1000  # of a system
_DIGEST = re.compile(r"[0-9a-f]{32}")
_ADVICE = "the file is damaged or was changed; ask for it again"

System = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PromisedShard:
    """A shard that must come of the recipe."""

    name: str
    samples: int
    content_digest: str


@dataclass(frozen=True)
class PortableRecipe:
    """A dataset as a recipe.

    Attributes:
        recipe: JSON-like, as ``recipe.json`` and the manifest hold it; its kind, sizes and parameters are not checked.
        recipe_digest: of it.
        label_type: of the samples.
        systems: a float64 array for every class, (maps, 2, 3) or (maps, 7), finite; they have the recipe's digest.
        splits: the shards that must come of it, in order, by split.
    """

    recipe: Mapping[str, Any]
    recipe_digest: str
    label_type: LabelType
    systems: tuple[System, ...]
    splits: Mapping[str, tuple[PromisedShard, ...]]

    def content_digest(self) -> str:
        """The content digest that the dataset must have; see ``Manifest.content_digest``."""
        return mapping_digest({name: [one.content_digest for one in shards] for name, shards in self.splits.items()})

    def broken_promises(self, splits: Mapping[str, tuple[Shard, ...]]) -> list[str]:
        """The names of shards that differ in a dataset which was built, or that only one of the two has."""
        promised = {one.name: one.content_digest for shards in self.splits.values() for one in shards}
        found = {one.name: one.content_digest for shards in splits.values() for one in shards}
        return sorted(name for name in promised | found if promised.get(name) != found.get(name))


def export_recipe(manifest: Manifest) -> bytes:
    """The portable recipe of a rendered dataset, as JSON text.

    Raises:
        FractalError: if its images were not rendered from systems, or the folder contradicts itself.
        OSError: if the systems cannot be read.
    """
    folder = manifest.folder
    if not isinstance(manifest.recipe.get("systems_digest"), str):
        raise FractalError(
            f"{folder}: its images were not rendered from systems, so no recipe can make them again; share the files "
            f"with 'fractalshards push {folder} URL' and 'fractalshards pull URL DIR'"
        )
    systems = read_systems(folder / SYSTEMS)
    shortest = len("0.0,") * sum(system.size for system in systems)
    if shortest > MAX_JSON_BYTES or len(text := _layout(manifest, systems)) > MAX_JSON_BYTES:  # some 30,000 classes
        raise FractalError(
            f"{folder}: its recipe would be larger than {MAX_JSON_BYTES >> 20} MiB; share the files with "
            f"'fractalshards push {folder} URL' and 'fractalshards pull URL DIR'"
        )
    parse_portable(text, str(folder))  # a folder that was tampered with is refused here, not where the file arrives
    return text


def read_portable(path: Path) -> PortableRecipe:
    """Read and check a portable recipe.

    Raises:
        FractalError: if it is not one, or contradicts itself.
        OSError: if it cannot be read.
    """
    return _parse(Fields.read(path), str(path))


def parse_portable(text: bytes, where: str) -> PortableRecipe:
    """Check the text of a portable recipe that came from ``where``; see ``read_portable``."""
    return _parse(Fields.parse(text, where), where)


def _layout(manifest: Manifest, systems: tuple[System, ...]) -> bytes:
    """Fields one below the other, a line for every system."""
    head = {
        _VERSION: PORTABLE_VERSION,
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


def _parse(fields: Fields, where: str) -> PortableRecipe:
    if _VERSION not in fields:
        raise FractalError(f"{where}: not a portable recipe; make one with 'fractalshards recipe DIR > recipe.json'")
    if (found := fields.count(_VERSION)) != PORTABLE_VERSION:
        raise FractalError(f"{where}: portable recipe version {found}, not {PORTABLE_VERSION}; upgrade fractalpretrain")
    recipe = fields.mapping("recipe")
    for what in recipe_problems(recipe, fields.text("recipe_digest")):
        raise FractalError(f"{where}: {what}; {_ADVICE}")
    systems = _parse_systems(fields.items("systems"), where)
    if systems_digest(systems) != recipe.get("systems_digest"):
        raise FractalError(f"{where}: systems digest differs: the systems were changed; {_ADVICE}")
    if recipe.get("classes", len(systems)) != len(systems):
        raise FractalError(f"{where}: {len(systems)} systems for {str(recipe['classes'])[:20]} classes; {_ADVICE}")
    portable = PortableRecipe(
        recipe=recipe,
        recipe_digest=fields.text("recipe_digest"),
        label_type=find_label_type(fields.text("label_type"), where),
        systems=systems,
        splits=_parse_splits(fields, where),
    )
    if portable.content_digest() != fields.text("content_digest"):
        raise FractalError(f"{where}: content digest differs: the digests of shards were changed; {_ADVICE}")
    return portable


def _parse_systems(values: list[Any], where: str) -> tuple[System, ...]:
    if not 1 <= len(values) <= MAX_CLASSES:
        raise FractalError(f"{where}: {len(values)} systems, but there may be 1 to {MAX_CLASSES:,}; {_ADVICE}")
    return tuple(_parse_system(value, f"{where}: system {index}") for index, value in enumerate(values))


def _parse_system(value: object, where: str) -> System:
    """A list of maps, all of one of the two shapes, of finite numbers."""
    for shape in MAP_SHAPES:
        if isinstance(value, list) and 1 <= len(value) <= _MAX_MAPS and all(_has_shape(one, shape) for one in value):
            return np.array(value, np.float64)
    raise FractalError(f"{where} is not a list of maps of 2 x 3 or 7 finite numbers; {_ADVICE}")


def _has_shape(value: object, shape: tuple[int, ...]) -> bool:
    if not shape:
        return isinstance(value, float) and math.isfinite(value)
    return isinstance(value, list) and len(value) == shape[0] and all(_has_shape(one, shape[1:]) for one in value)


def _parse_splits(fields: Fields, where: str) -> dict[str, tuple[PromisedShard, ...]]:
    rows = shard_rows(fields, where, lambda split: (split.counts("shard_lengths"), split.texts("content_digests")))
    splits = {name: tuple(PromisedShard(*row) for row in listed) for name, listed in rows.items()}
    if not all(_DIGEST.fullmatch(shard.content_digest) for shards in splits.values() for shard in shards):
        raise FractalError(f"{where}: a content digest is not 32 hexadecimal digits; {_ADVICE}")
    return splits
