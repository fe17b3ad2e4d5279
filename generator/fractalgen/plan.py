"""Which sample is what, and which shard holds it: pure functions of the recipe, nothing is ever listed."""

from dataclasses import dataclass

from fractalgen.recipe import Recipe
from fractalgen.rng import Stream
from fractalshards.names import shard_name
from fractalshards.splitmix import MASK64, mix64

_ROUNDS = 6


@dataclass(frozen=True)
class Place:
    """What a sample is: the ``replica``-th image of class ``label`` in its split."""

    split: str
    label: int
    replica: int


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: samples ``first`` to ``stop - 1``."""

    split: str
    name: str
    first: int
    stop: int


def locate(recipe: Recipe, index: int) -> Place:
    """What sample ``index`` is.

    A seeded permutation of each split mixes the classes; dealing the permuted numbers out to the classes in turn
    makes their counts differ by at most one.

    Raises:
        IndexError: if the index is not in [0, n + val).
    """
    if not 0 <= index < recipe.n + recipe.val:
        raise IndexError(f"sample {index} of {recipe.n + recipe.val}")
    split, start, count = ("train", 0, recipe.n) if index < recipe.n else ("val", recipe.n, recipe.val)
    unit = permute(index - start, count, Stream.of("order", recipe.seed, split).bits64())
    return Place(split, unit % recipe.classes, unit // recipe.classes)


def shard_tasks(recipe: Recipe) -> tuple[ShardTask, ...]:
    """All shards of a dataset, ``train`` before ``val``."""
    tasks = []
    for split, start, stop in (("train", 0, recipe.n), ("val", recipe.n, recipe.n + recipe.val)):
        for shard, first in enumerate(range(start, stop, recipe.shard_size)):
            tasks.append(ShardTask(split, shard_name(split, shard), first, min(first + recipe.shard_size, stop)))
    return tuple(tasks)


def permute(index: int, count: int, key: int) -> int:
    """The place of ``index`` in a pseudorandom permutation of range(count), in constant time and memory.

    A balanced Feistel network on the smallest even number of bits that holds ``count``; what falls outside is sent
    through again until it lies inside (cycle walking, Black & Rogaway 2002).
    """
    half = max((count - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ mix64((key + (turn << 56) + right) & MASK64) & mask
        index = left << half | right
        if index < count:
            return index
