"""Which sample is what, and which shard holds it: pure functions of the recipe, nothing is ever listed."""

from collections.abc import Iterator
from dataclasses import dataclass

from fractalgen.kernels.random import Stream
from fractalgen.kinds import find_kind
from fractalgen.kinds.kind import Unit
from fractalgen.recipe import Recipe
from fractalshards.manifest import shard_name
from fractalshards.random import MASK64, mix64
from fractalshards.writer import ShardTask

_ROUNDS = 6
_BLOCK_PIXELS = 1 << 25  # images of units are shuffled in blocks, of which a worker holds the renders


@dataclass(frozen=True)
class Place:
    """What a sample is: image ``part`` of a unit, of which the dataset takes the first ``parts``."""

    unit: Unit
    part: int
    parts: int


def locate(recipe: Recipe, index: int) -> Place:
    """What sample ``index`` is.

    Every class has equally many whole units, in the order of a seeded permutation that mixes the classes; the images
    that are left, less than a unit per class, are dealt to the classes evenly. So the counts of classes differ by at
    most one. Images that share a unit lie in one shard, shuffled with those of its other units.

    Raises:
        IndexError: if the index is not in [0, n + val).
    """
    line = next((line for line in _lines(recipe) if line.first <= index < line.first + line.samples), None)
    if line is None:
        raise IndexError(f"sample {index} of {recipe.n + recipe.val}")
    position = _shuffle(line, index - line.first)
    start, stop = _unit_bounds(line, position)
    label, number = _deal(line, position)
    return Place(Unit(recipe.seed, line.split, label, number, line.before), position - start, stop - start)


def shard_tasks(recipe: Recipe) -> tuple[ShardTask, ...]:
    """All shards of a dataset, ``train`` before ``val``: of ``shard_size`` samples, and as many more as end a unit."""
    tasks = []
    for line in _lines(recipe):
        for shard, begin in enumerate(range(0, line.samples, line.shard_size)):
            start, stop = _align(line, begin), _align(line, begin + line.shard_size)
            if start < stop:
                tasks.append(
                    ShardTask(line.split, shard_name(line.split, shard), line.first + start, line.first + stop)
                )
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


@dataclass(frozen=True)
class _Line:
    """The samples of a split in a line, unit after unit; sample ``first`` of the dataset stands at position 0.

    The first ``rounds`` units of every class come whole, then what is left.
    """

    split: str
    first: int
    samples: int
    classes: int
    per_unit: int
    before: int
    seed: int
    shard_size: int
    block_size: int

    @property
    def rounds(self) -> int:
        return self.samples // (self.classes * self.per_unit)

    def key(self, purpose: str | int) -> int:
        return Stream.of("order", self.seed, self.split, purpose).bits64()


def _lines(recipe: Recipe) -> Iterator[_Line]:
    per_unit = find_kind(recipe.kind).images_per_unit
    block_size = max(_BLOCK_PIXELS // recipe.size**2, 1) * per_unit
    first = before = 0
    for split, samples in (("train", recipe.n), ("val", recipe.val)):
        yield _Line(split, first, samples, recipe.classes, per_unit, before, recipe.seed, recipe.shard_size, block_size)
        first += samples
        before += -(-samples // (recipe.classes * per_unit))


def _deal(line: _Line, position: int) -> tuple[int, int]:
    """Class and number of the unit at a position."""
    whole = line.rounds * line.classes
    if position < whole * line.per_unit:
        card = permute(position // line.per_unit, whole, line.key("whole"))
        return card % line.classes, card // line.classes
    return permute(_slot(line, position), line.classes, line.key("rest")), line.rounds


def _unit_bounds(line: _Line, position: int) -> tuple[int, int]:
    """Where the unit at a position starts and stops."""
    begin = line.rounds * line.classes * line.per_unit
    if position < begin:
        start = position - position % line.per_unit
        return start, start + line.per_unit
    slot, rest = _slot(line, position), line.samples - begin
    return begin + slot * rest // line.classes, begin + (slot + 1) * rest // line.classes


def _slot(line: _Line, position: int) -> int:
    """Which of the ``classes`` slots of the rest holds a position: the last whose start is not beyond it."""
    begin = line.rounds * line.classes * line.per_unit
    return ((position - begin + 1) * line.classes - 1) // (line.samples - begin)


def _align(line: _Line, position: int) -> int:
    """The next position, this one included, at which a unit starts, or the end of the line."""
    if position >= line.samples:
        return line.samples
    return _unit_bounds(line, position - 1)[1] if position else 0


def _piece(line: _Line, position: int, begin: int, end: int, length: int) -> tuple[int, int]:
    """The piece that holds a position when [begin, end) is cut every ``length``, cuts moved on to a unit's start."""
    cut = (position - begin) // length
    if _align(line, begin + cut * length) > position:
        cut -= 1
    return _align(line, begin + cut * length), min(_align(line, begin + (cut + 1) * length), end)


def _shuffle(line: _Line, position: int) -> int:
    """Where on the line the sample stands that a shard holds at a position: shuffled inside the blocks of a shard."""
    if line.per_unit == 1:
        return position
    shard = _piece(line, position, 0, line.samples, line.shard_size)
    start, stop = _piece(line, position, *shard, line.block_size)
    return start + permute(position - start, stop - start, line.key(start))
