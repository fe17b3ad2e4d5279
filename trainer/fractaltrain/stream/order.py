"""The order of an epoch, as pure functions: every sample once, the same number of steps on every rank.

Permute the shards by (seed, epoch); cut the sequence into windows of W shards; permute the samples inside each
window: that is the global order. Global batch b is its positions [bB, (b + 1)B), and rank r of R takes the r-th of
R equal parts of them. An example with three shards of 4, 2 and 3 samples, windows of two shards, two ranks, B = 4:

>>> order = epoch_order([4, 2, 3], seed=0, epoch=0, window=2)
>>> order.tolist()  # shards 0 (samples 0-3) and 1 (4-5) make the first window, shard 2 (6-8) the second
[0, 2, 3, 5, 1, 4, 8, 7, 6]
>>> steps_per_epoch(9, batch=4, pad=False)
2
>>> order[training_positions(9, batch=4, rank=0, world=2, pad=False)].tolist()  # a row per step
[[0, 2], [1, 4]]
>>> order[training_positions(9, batch=4, rank=1, world=2, pad=False)].tolist()
[[3, 5], [8, 7]]

Repeated augmentation trains on a third of the samples of each epoch, three times each:

>>> repeated(order, 3).tolist()
[0, 0, 0, 2, 2, 2, 3, 3, 3]

Nothing is buffered and nothing depends on workers, so a run that stopped at (epoch, step) continues by computing
the same arrays and leaving out the first ``step`` rows, with any number of workers and any number of ranks.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from fractalshards.errors import UsageError
from fractalshards.random import permutation
from fractaltrain.data.source import Indices
from fractaltrain.recipes.recipe import TrainRecipe
from fractaltrain.seeding import Purpose, mix


def epoch_order(
    lengths: Sequence[int], seed: int, epoch: int, window: int, passes: int = 1, fresh: bool = False
) -> Indices:
    """Return the global order of an epoch: ``passes`` permutations of all sample indices, one after the other, int64.

    Args:
        lengths: samples per shard; the samples of shard k have the indices after those of shards 0..k-1.
        seed: of the run, in [0, 2^64).
        epoch: counted from 0.
        window: shards that are shuffled together, at least 1.
        passes: passes over the samples in an epoch. Pass p of epoch e has the order of epoch ``e * passes + p`` with
            one pass.
        fresh: every pass shows new images: in pass k of all epochs, sample i has the index ``k * n + i``.
    """
    samples = sum(lengths)
    numbers = range(epoch * passes, (epoch + 1) * passes)
    return np.concatenate([_pass_order(lengths, seed, number, window) + number * samples * fresh for number in numbers])


def _pass_order(lengths: Sequence[int], seed: int, number: int, window: int) -> Indices:
    starts = np.cumsum([0, *lengths])
    order = [np.empty(0, np.int64)]
    for place, shards in enumerate(shard_windows(len(lengths), seed, number, window)):
        members = [np.arange(starts[shard], starts[shard + 1]) for shard in shards]
        samples = np.concatenate(members)
        order.append(samples[permutation(len(samples), mix(seed, Purpose.WINDOW, number, place))])
    return np.concatenate(order)


def shard_windows(shards: int, seed: int, number: int, window: int) -> list[Indices]:
    """Return the shards that are shuffled together, in the order of pass ``number`` over the data: arrays of ``window``
    shard numbers, of which the last may be shorter."""
    order = permutation(shards, mix(seed, Purpose.SHARDS, number))
    return [order[first : first + window] for first in range(0, shards, window)]


def epoch_samples(samples: int, repeats: int, passes: int = 1) -> int:
    """Return the number of positions in the order of an epoch, see ``epoch_order`` and ``repeated``."""
    return samples * passes // repeats * repeats


def repeated(order: Indices, repeats: int) -> Indices:
    """Return an order with repeated augmentation: its first floor(n / repeats) samples, each ``repeats`` times.

    The repeats of a sample are neighbours, so they share a global batch except at its ends; each is augmented by its
    position. (Hoffer et al., Augment your batch, CVPR 2020; DeiT repeats three times.)
    """
    return np.repeat(order[: len(order) // repeats], repeats)


def steps_per_epoch(samples: int, batch: int, pad: bool) -> int:
    """Return the steps of an epoch: floor(samples / batch), or the ceiling if ``pad`` fills the last batch."""
    return -(-samples // batch) if pad else samples // batch


def check_batch(recipe: TrainRecipe, processes: int, accumulate: int, samples: int | None = None) -> None:
    """Check that the batch splits equally among processes and their parts, and into pairs if images are mixed.

    Raises UsageError, with a batch size that works, if it does not, or if it is larger than the epoch.

    Args:
        processes: number of training processes.
        accumulate: number of equal parts in which each process computes its share.
        samples: number of samples in an epoch; None: not known yet.
    """
    unit = processes * math.lcm(accumulate, 2 if recipe.mixes else 1)
    if recipe.batch_size % unit:
        pairs = ", mixing pairs of images" if recipe.mixes else ""
        raise UsageError(
            f"a batch of {recipe.batch_size} cannot be split equally (--nproc {processes}, --accumulate {accumulate}"
            f"{pairs}); use --batch-size {max(recipe.batch_size // unit, 1) * unit}"
        )
    if samples is not None and recipe.batch_size > samples:
        largest = samples // unit * unit
        advice = f"lower --batch-size to {largest}" if largest else "use more images, or lower --nproc or --accumulate"
        raise UsageError(f"a batch of {recipe.batch_size} is larger than the {samples} training samples; {advice}")


def training_positions(samples: int, batch: int, rank: int, world: int, pad: bool, nodes: int = 1) -> Indices:
    """Return the positions that a rank trains on: (steps, batch / world) int64, the same shape on all ranks.

    With ``pad`` the last positions run past the end of the order and wrap around (take them modulo ``samples``): every
    sample occurs at least once, at most ``batch - 1`` of them twice.

    Args:
        batch: global, at most ``samples`` and a multiple of ``world``, see ``check_batch``.
        nodes: machines, each with the same number of consecutive ranks. Each trains on its own part of the order, see
            ``node_positions``, so it only reads its share of the shards.
    """
    steps, local = steps_per_epoch(samples, batch, pad), world // nodes
    positions = np.arange(steps * batch, dtype=np.int64).reshape(nodes, steps, local, batch // world)
    return positions[rank // local, :, rank % local]


def node_positions(samples: int, batch: int, node: int, nodes: int, pad: bool) -> range:
    """Return the positions that one of several machines trains on; the machines have equal, consecutive parts."""
    size = steps_per_epoch(samples, batch, pad) * batch // nodes
    return range(node * size, (node + 1) * size)


def evaluation_positions(samples: int, batch: int, rank: int, world: int) -> list[Indices]:
    """Return the samples that a rank evaluates, in batches of at most ceil(batch / world); each sample on one rank.

    Ranks may differ by one sample, and so by one batch: nothing inside an evaluation is collective.
    """
    mine = np.arange(rank, samples, world, dtype=np.int64)
    size = -(-batch // world)
    return [mine[start : start + size] for start in range(0, len(mine), size)]


class PrefetchSchedule:
    """The shards that training reads next, so that remote ones can be fetched ahead of time."""

    def __init__(
        self, lengths: Sequence[int], seed: int, window: int, repeats: int, passes: int, positions: range | None = None
    ) -> None:
        """Create the schedule of a run, for the ``positions`` of every epoch that this machine trains on (None: all).

        See ``epoch_order`` and ``repeated`` for the other arguments.
        """
        self._lengths, self._seed, self._window = lengths, seed, window
        self._repeats, self._passes = repeats, passes
        samples = sum(lengths) * passes // repeats
        positions = positions or range(samples * repeats)
        self._first, self._last = (min(end // repeats, samples - 1) for end in (positions.start, positions.stop - 1))
        self._windows = lru_cache(maxsize=2)(self._find_windows)

    def shards(self, epoch: int, position: int) -> tuple[int, ...]:
        """Return the shards of the window at a position of an epoch, then those of the next window, without duplicates.

        The last window that this machine reads in an epoch is followed by the first one that it reads in the next.
        """
        windows, ends = self._windows(epoch)
        number = bisect_right(ends, min(position // self._repeats, self._last))
        if number < bisect_right(ends, self._last):
            following = windows[number + 1]
        else:
            next_windows, next_ends = self._windows(epoch + 1)
            following = next_windows[bisect_right(next_ends, self._first)]
        return tuple(dict.fromkeys([*windows[number], *following]))

    def _find_windows(self, epoch: int) -> tuple[list[list[int]], list[int]]:
        """Return the windows of an epoch, and the number of samples up to the end of each."""
        passes = range(epoch * self._passes, (epoch + 1) * self._passes)
        shards = [shard_windows(len(self._lengths), self._seed, number, self._window) for number in passes]
        windows = [window.tolist() for windows in shards for window in windows]
        return windows, list(accumulate(sum(self._lengths[shard] for shard in shards) for shards in windows))
