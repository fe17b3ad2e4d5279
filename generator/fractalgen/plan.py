"""Maps a sample index to its unit and shard: pure functions of the recipe, in constant time and memory."""

from dataclasses import dataclass

from fractalgen.kernels.random import Stream
from fractalgen.kinds.kind import Unit
from fractalgen.recipe import Recipe
from fractalshards.manifest import shard_name
from fractalshards.random import MASK64, mix64
from fractalshards.writer import ShardTask

_ROUNDS = 6
_BLOCK_PIXELS = 1 << 25  # images are shuffled in blocks of this size, because a worker holds the renders of a block


@dataclass(frozen=True)
class Place:
    """What a sample shows: image ``part`` of a unit, of which the dataset uses the first ``parts`` images."""

    unit: Unit
    part: int
    parts: int


def locate(recipe: Recipe, index: int, epoch: int = 0) -> Place:
    """Return the unit and image that sample ``index`` shows.

    Every class has the same number of whole units, in the order of a seeded permutation over all classes; the remaining
    images, less than a unit per class, are divided evenly among the classes. Class counts therefore differ by at most
    one. Images of one unit are in the same shard, shuffled together with those of its other units.

    In later epochs a training sample shows the same image of new units: if the build has at most U units per class, its
    unit ``k`` is followed by ``k + U``, ``k + 2 U`` and so on. Raises IndexError if the index is not in [0, n + val).
    """
    if not 0 <= index < recipe.n + recipe.val:
        raise IndexError(f"sample index is {index}: expected 0 to {recipe.n + recipe.val - 1}")
    train, val = _splits(recipe)
    split = train if index < recipe.n else val
    position = _shuffled(split, index - split.offset)
    start, stop = _unit_bounds(split, position)
    label, number = _unit_at(split, position)
    unit = Unit(recipe.seed, split.name, label, number + epoch * train.units, (train.units, val.units))
    return Place(unit, position - start, stop - start)


def shard_tasks(recipe: Recipe) -> tuple[ShardTask, ...]:
    """List all shards of a dataset, ``train`` before ``val``.

    A shard holds ``shard_size`` samples, plus those that complete its last unit.
    """
    tasks = []
    for split in _splits(recipe):
        for number, begin in enumerate(range(0, split.samples, recipe.shard_size)):
            start, stop = _align(split, begin), _align(split, begin + recipe.shard_size)
            if start < stop:
                name = shard_name(split.name, number)
                tasks.append(ShardTask(split.name, name, split.offset + start, split.offset + stop))
    return tuple(tasks)


def permute(index: int, count: int, key: int) -> int:
    """Return where a pseudorandom permutation of range(count) maps ``index``, in constant time and memory.

    A balanced Feistel network on the smallest even number of bits that holds ``count``; results outside the range are
    permuted again until they lie inside (cycle walking, Black & Rogaway 2002).
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


@dataclass(frozen=True)
class _Split:
    """The samples of a split by position, unit after unit; position 0 is sample ``offset`` of the dataset."""

    recipe: Recipe
    name: str
    classes: int
    samples: int
    offset: int
    per_unit: int
    rounds: int  # whole units of every class
    whole: int  # positions in whole units; the remainder is less than a unit per class
    units: int  # the most units of a class

    def key(self, purpose: str | int) -> int:
        return Stream.of("order", self.recipe.seed, self.name, purpose).bits64()


def _splits(recipe: Recipe) -> tuple[_Split, _Split]:
    return _split(recipe, "train", recipe.n, 0), _split(recipe, "val", recipe.val, recipe.n)


def _split(recipe: Recipe, name: str, samples: int, offset: int) -> _Split:
    per_unit = recipe.family.images_per_unit
    rounds, rest = divmod(samples, recipe.classes * per_unit)
    return _Split(recipe, name, recipe.classes, samples, offset, per_unit, rounds, samples - rest, rounds + (rest > 0))


def _unit_at(split: _Split, position: int) -> tuple[int, int]:
    """Class and number of the unit at a position."""
    if position < split.whole:
        unit = permute(position // split.per_unit, split.rounds * split.classes, split.key("whole"))
        return unit % split.classes, unit // split.classes
    return permute(_share(split, position), split.classes, split.key("rest")), split.rounds


def _unit_bounds(split: _Split, position: int) -> tuple[int, int]:
    """First position of the unit at a position, and the one after its last."""
    if position < split.whole:
        start = position - position % split.per_unit
        return start, start + split.per_unit
    share, remainder = _share(split, position), split.samples - split.whole
    return split.whole + share * remainder // split.classes, split.whole + (share + 1) * remainder // split.classes


def _share(split: _Split, position: int) -> int:
    """Return which of the ``classes`` equal shares of the remainder holds a position."""
    return ((position - split.whole + 1) * split.classes - 1) // (split.samples - split.whole)


def _align(split: _Split, position: int) -> int:
    """The first position at or after this one at which a unit starts, or the end of the split."""
    if position >= split.samples:
        return split.samples
    return _unit_bounds(split, position - 1)[1] if position else 0


def _block(split: _Split, position: int, begin: int, end: int, length: int) -> tuple[int, int]:
    """Bounds of the block around a position if [begin, end) is cut every ``length`` samples, aligned to units."""
    number = (position - begin) // length
    if _align(split, begin + number * length) > position:
        number -= 1
    return _align(split, begin + number * length), min(_align(split, begin + (number + 1) * length), end)


def _shuffled(split: _Split, position: int) -> int:
    """Permute a position within its block of a shard, so that images of a unit do not follow each other."""
    if split.per_unit == 1:
        return position
    shard = _block(split, position, 0, split.samples, split.recipe.shard_size)
    pixels = split.recipe.size**2 * split.recipe.family.images_in_memory
    block_size = max(_BLOCK_PIXELS // pixels, 1) * split.per_unit
    start, stop = _block(split, position, *shard, block_size)
    return start + permute(position - start, stop - start, split.key(start))
