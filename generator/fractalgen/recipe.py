"""The recipe: the frozen, hashable description of a dataset, checked when it is made."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from fractalgen.kernels import MAX_POINTS, SIZES
from fractalgen.kinds import KINDS, Kind, find_kind
from fractalshards.digest import mapping_digest, systems_digest
from fractalshards.errors import FractalError, UsageError
from fractalshards.manifest import MAX_CLASSES, MAX_SAMPLES, MAX_SHARD_SIZE, MAX_SHARDS
from fractalshards.settings import override
from fractalshards.systems import Systems

RECIPE_VERSION = 3  # raise it whenever the pixels or labels of a recipe change
_RANGES = {
    "n": (1, MAX_SAMPLES),
    "val": (0, MAX_SAMPLES),
    "classes": (1, MAX_CLASSES),
    "size": (SIZES.start, SIZES.stop - 1),
    "points": (1, MAX_POINTS),
    "seed": (0, 2**63 - 1),
    "shard_size": (1, MAX_SHARD_SIZE),
}


@dataclass(frozen=True)
class Recipe:
    """The description of a dataset: equal recipes with equal systems give equal samples, everywhere.

    Samples are numbered 0..n-1 in the split ``train`` and n..n+val-1 in ``val``. For most fields see ``make_recipe``.

    Attributes:
        params: the parameters of the kind; made from a mapping of those that differ from its defaults.
        systems_digest: digest of the systems; empty until they are drawn.
        version: the version of the renderer; see ``RECIPE_VERSION``.
    """

    kind: str
    n: int
    val: int
    classes: int
    size: int
    points: int
    seed: int
    shard_size: int
    params: Any
    systems_digest: str = ""
    version: int = RECIPE_VERSION

    def __post_init__(self) -> None:
        kind = self.family
        for name, (low, high) in (_RANGES if kind.points else _RANGES | {"points": (0, 0)}).items():
            value = getattr(self, name)
            within = isinstance(value, int | np.integer) and low <= int(value) <= high
            expected = f"an integer from {low} to {high:,}" if high else "none"
            _require(within, f"{name} is {value!r}: kind {self.kind} takes {expected}")
            object.__setattr__(self, name, int(value))  # not numpy's, because a recipe is hashed as JSON
        if isinstance(self.params, Mapping):
            object.__setattr__(self, "params", override(kind.params(), self.params))
        _require(isinstance(self.params, kind.params), f"params: kind {self.kind} takes {kind.params.__name__}")
        enough = self.n >= self.classes or kind.label_type == "multi"
        _require(enough, f"n is {self.n}, fewer images than the {self.classes} classes: raise n or lower classes")
        kind.check(self.params, self.n, self.val, self.classes)
        _require(self.n + self.val <= MAX_SAMPLES, f"n + val is over {MAX_SAMPLES:,}: build several datasets")
        per_unit = kind.images_per_unit
        _require(self.shard_size >= per_unit, f"shard_size is {self.shard_size}: {self.kind} takes at least {per_unit}")
        shards = (self.n + self.val) // self.shard_size
        _require(shards <= MAX_SHARDS, f"{shards:,} shards are too many for a manifest: raise shard_size")
        _require(self.version == RECIPE_VERSION, f"recipe version {self.version}: this software makes {RECIPE_VERSION}")

    @property
    def family(self) -> Kind:
        """The kind named by ``kind``."""
        return find_kind(self.kind)

    def to_json(self) -> dict[str, Any]:
        """Return the recipe as JSON-compatible values, with lists for tuples."""
        return msgspec.json.decode(msgspec.json.encode(self), type=dict[str, Any])

    def digest(self) -> str:
        """Return 32 hexadecimal digits that identify the recipe, systems included."""
        return mapping_digest(self.to_json())

    def with_systems(self, systems: Systems) -> "Recipe":
        """Return this recipe with the digest of its systems."""
        return replace(self, systems_digest=systems_digest(systems))


def parse_recipe(data: Mapping[str, Any], digest: str, where: str) -> Recipe:
    """Make the recipe that JSON-like data from ``where`` describes: the inverse of ``Recipe.to_json``.

    Raises FractalError if this version of the software does not render such a recipe, or ``digest``, which was stored
    beside it, differs.
    """
    if data.get("kind") not in list(KINDS):  # it may be unhashable
        kind = str(data.get("kind"))[:20]
        raise FractalError(f"{where}: this fractalpretrain does not render kind {kind!r}; pack or fetch them again")
    if (version := data.get("version")) != RECIPE_VERSION:
        found = f"recipe version {str(version)[:20]}, expected {RECIPE_VERSION}"
        raise FractalError(f"{where}: {found}; install the fractalpretrain that made it")
    try:
        recipe = msgspec.convert(data, Recipe)
    except (msgspec.ValidationError, UsageError) as error:
        raise FractalError(f"{where}: {error}") from error
    if recipe.digest() != digest:
        raise FractalError(f"{where}: recipe digest differs: the recipe was changed; fetch it again")
    return recipe


def make_recipe(
    kind: str,
    n: int | None = None,
    *,
    val: int = 0,
    classes: int | None = None,
    size: int | None = None,
    points: int | None = None,
    seed: int = 0,
    shard_size: int = 1000,
    overrides: Mapping[str, object] | None = None,
) -> Recipe:
    """Make a recipe, with the kind's defaults for arguments that are None.

    Raises UsageError if a value is unknown, malformed or out of range.

    Args:
        kind: name of a kind, see ``fractalgen.kinds.KINDS``.
        n: training samples, at least 1. Kinds that are published as a dataset have a default.
        val: validation samples of the same classes; they share no render with the training samples.
        classes: number of classes, each with one system, 1 to 100,000; at most n for kinds with one class per image.
        size: side length of the images in pixels, 16 to 4096.
        points: points of each chaos game, 1 to 100,000,000; 0 for kinds that play none.
        seed: seed of all random numbers, 0 to 2**63 - 1.
        shard_size: samples per shard.
        overrides: parameters of the kind by name, as values or as text: ``{"blur_probability": 0, "maps": "2,4"}``.
    """
    chosen = find_kind(kind)
    n = chosen.n if n is None else n
    if n is None:
        raise UsageError(f"kind {kind} has no default number of images; give it with --n")
    classes = chosen.classes if classes is None else classes
    size = chosen.size if size is None else size
    points = chosen.points if points is None else points
    return Recipe(kind, n, val, classes, size, points, seed, shard_size, overrides or {})


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise UsageError(otherwise)
