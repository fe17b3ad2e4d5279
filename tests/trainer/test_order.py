import doctest
import hashlib
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractalshards.errors import FractalError
from fractaltrain.stream import order as module
from fractaltrain.stream.order import (
    epoch_order,
    epoch_samples,
    evaluation_positions,
    rank_batch,
    repeated,
    training_positions,
)

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def test_docstring_example():
    assert doctest.testmod(module).failed == 0


def test_order_never_changes():
    """A stopped run must find its order again after any update: these bits are a promise."""
    order = epoch_order([1000] * 7, seed=3, epoch=11, window=2)
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == "f5e0d1fbc5e67f43"


@given(LENGTHS, st.integers(0, 2**63 - 1), st.integers(0, 1000), st.integers(1, 15))
def test_order_is_a_permutation_of_all_samples(lengths, seed, epoch, window):
    order = epoch_order(lengths, seed, epoch, window)
    assert sorted(order.tolist()) == list(range(sum(lengths)))


@given(LENGTHS, st.integers(0, 2**63 - 1), st.integers(1, 15))
def test_a_window_holds_whole_shards_and_no_others(lengths, seed, window):
    order = epoch_order(lengths, seed, 0, window)
    shard_of = np.repeat(np.arange(len(lengths)), lengths)[order]
    at, seen = 0, set()
    while at < len(order):
        left = set(range(len(lengths))) - seen
        here: set[int] = set()
        size = 0
        while len(here) < min(window, len(left)):  # the window ends with the last sample of its W shards
            size += 1
            here = {shard for shard in left if np.count_nonzero(shard_of[at : at + size] == shard) == lengths[shard]}
        assert size == sum(lengths[shard] for shard in here)
        seen |= here
        at += size


def test_every_epoch_and_seed_has_its_own_order():
    orders = {tuple(epoch_order([5, 5], seed, epoch, 2).tolist()) for seed, epoch in product(range(6), range(6))}
    assert len(orders) == 36


SHARDS, LENGTH = 64, 250  # samples of a shard


def shuffled(window: int, epoch: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The order of an epoch, and the shard of each of its samples."""
    order = epoch_order([LENGTH] * SHARDS, seed=5, epoch=epoch, window=window)
    return order, order // LENGTH


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(np.argsort(np.argsort(first)), np.argsort(np.argsort(second)))[0, 1])


@pytest.mark.parametrize("window", [1, 2, 4, 16, 64])
def test_neighbours_come_from_all_shards_of_a_window(window):
    """Two neighbours share their shard as often as two samples drawn from a window of W shards do."""
    _, shard = shuffled(window)
    expected = (LENGTH - 1) / (window * LENGTH - 1)
    chance = 4 * (expected / len(shard)) ** 0.5
    assert np.mean(shard[1:] == shard[:-1]) == pytest.approx(expected, abs=max(chance, SHARDS / len(shard)))


@pytest.mark.parametrize("window", [2, 4, 16])
def test_samples_of_a_shard_land_evenly_over_their_window(window):
    """Ten parts of a window have of each of its shards what chance gives: chi square is one per degree of freedom."""
    _, shard = shuffled(window)
    expected = LENGTH / 10
    for samples in shard.reshape(-1, window * LENGTH):
        members = np.unique(samples)
        counts = np.array([np.bincount(part, minlength=SHARDS)[members] for part in samples.reshape(10, -1)])
        assert len(members) == window
        assert counts.min() > 0
        freedom = 9 / 10 * (1 - 1 / window)
        spread = 4 * (2 / (9 * (window - 1))) ** 0.5  # four standard deviations of the mean
        assert ((counts - expected) ** 2 / expected).mean() / freedom == pytest.approx(1, abs=spread)


def test_shards_that_share_a_window_change_with_the_epoch():
    """How often two shards meet is spread as chance does it: no pair is favoured, and none is kept apart."""
    pairs: Counter[tuple[int, int]] = Counter()
    for epoch in range(30):
        _, shard = shuffled(4, epoch)
        for samples in shard.reshape(-1, 4 * LENGTH):
            pairs.update(combinations(np.unique(samples).tolist(), 2))
    times = np.array([pairs[pair] for pair in combinations(range(SHARDS), 2)])
    assert times.var() / times.mean() == pytest.approx(1 - 3 / (SHARDS - 1), abs=0.15)  # of 30 draws with p = 3 / 63


@pytest.mark.parametrize("window", [1, 4, 64])
def test_samples_of_a_shard_are_in_another_order_in_every_epoch(window):
    """Rank correlations between two epochs, and with the index, are those of chance: of N(0, 1 / n) for n samples."""
    place, later = (np.argsort(shuffled(window, epoch)[0]).reshape(SHARDS, LENGTH) for epoch in (0, 1))
    index = np.arange(LENGTH)
    for correlations in (list(map(rank_correlation, place, later)), [rank_correlation(row, index) for row in place]):
        assert np.std(correlations) == pytest.approx(LENGTH**-0.5, rel=0.4)
        assert abs(np.mean(correlations)) < 4 * (LENGTH * SHARDS) ** -0.5


def test_a_window_of_all_shards_is_a_shuffle_of_all():
    order, _ = shuffled(SHARDS)
    other, _ = shuffled(SHARDS, epoch=1)
    bound = 4 / len(order) ** 0.5
    assert abs(rank_correlation(order, np.arange(len(order)))) < bound
    assert abs(rank_correlation(np.argsort(order), np.argsort(other))) < bound
    assert np.abs(np.diff(order)).mean() == pytest.approx(len(order) / 3, rel=0.03)


@given(LENGTHS, st.integers(1, 5))
def test_repeated_order_takes_the_first_samples_so_many_times(lengths, repeats):
    order = epoch_order(lengths, seed=1, epoch=2, window=3)
    again = repeated(order, repeats)
    chosen = order[: len(order) // repeats]
    assert len(again) == epoch_samples(len(order), repeats) == len(chosen) * repeats
    assert np.array_equal(again.reshape(len(chosen), repeats), np.stack([chosen] * repeats, axis=1))


def test_repeated_order_of_every_small_epoch():
    for samples, repeats in product(range(1, 13), range(1, 5)):
        times = np.bincount(repeated(np.arange(samples), repeats), minlength=samples)
        taken = samples // repeats
        assert times.tolist() == [repeats] * taken + [0] * (samples - taken)


CASES = [
    (samples, batch, world, pad)
    for samples, batch, world, pad in product(range(1, 26), range(1, 13), (1, 2, 3, 4), (False, True))
    if batch <= samples and batch % world == 0
]


def test_exhaustive_epochs():
    """Law 4 for every small case: equal steps on all ranks, exact epochs, batches independent of the world size."""
    for samples, batch, world, pad in CASES:
        ranks = [training_positions(samples, batch, rank, world, pad) for rank in range(world)]
        steps = -(-samples // batch) if pad else samples // batch
        assert all(rank.shape == (steps, batch // world) for rank in ranks)
        for step in range(steps):
            together = np.concatenate([rank[step] for rank in ranks])
            assert together.tolist() == list(range(step * batch, (step + 1) * batch))
        times = np.bincount(np.concatenate(ranks, axis=1).ravel() % samples, minlength=samples)
        if pad:
            assert times.min() == 1
            assert times.sum() - samples < batch
        else:
            assert times.max() == 1
            assert times.sum() == samples // batch * batch


SMALL = [lengths for count in (1, 2, 3) for lengths in product((1, 2, 4), repeat=count)]


def test_law_4_in_a_small_box():
    """All lengths of shards, windows, batches, worlds and paddings: an exact epoch, the same for every world size, and
    after a stop at any step the rest of it, whatever the world is then."""
    for lengths, window, pad in product(SMALL, (1, 2), (False, True)):
        samples = sum(lengths)
        order = epoch_order(lengths, seed=1, epoch=0, window=window)
        for batch in range(1, samples + 1):
            runs = []
            for world in (world for world in (1, 2, 3, 4) if batch % world == 0):
                ranks = [training_positions(samples, batch, rank, world, pad) for rank in range(world)]
                assert len({rank.shape for rank in ranks}) == 1
                runs.append(order[np.concatenate(ranks, axis=1) % samples])
            times = np.bincount(runs[0].ravel(), minlength=samples)
            assert times.sum() == (-(-samples // batch) if pad else samples // batch) * batch
            assert (times.min() >= 1 and times.max() <= 2) if pad else times.max() == 1
            for run, stop in product(runs, range(len(runs[0]))):
                assert np.array_equal(np.concatenate([runs[0][:stop], run[stop:]]), runs[0])


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 8))
def test_evaluation_sees_every_sample_once(samples, batch, world):
    ranks = [evaluation_positions(samples, batch, rank, world) for rank in range(world)]
    seen = [index for rank in ranks for part in rank for index in part.tolist()]
    assert sorted(seen) == list(range(samples))
    assert all(1 <= len(part) <= -(-batch // world) for rank in ranks for part in rank)


def test_world_that_does_not_divide_the_batch():
    with pytest.raises(FractalError, match=r"3 processes cannot share a batch of 64 equally; choose --batch-size 63"):
        rank_batch(64, 3)
    with pytest.raises(FractalError, match="choose --batch-size 4 "):
        rank_batch(2, 4)
