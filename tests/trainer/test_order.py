import doctest
import hashlib
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractalshards.errors import FractalError
from fractaltrain.stream import order as module
from fractaltrain.stream.order import (
    epoch_order,
    evaluation_positions,
    rank_batch,
    steps_per_epoch,
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


def test_shuffling_is_thorough():
    """Neighbours in the order come from anywhere in the window: their mean distance is a third of its samples."""
    order = epoch_order([500] * 8, seed=0, epoch=0, window=8)
    assert np.abs(np.diff(order)).mean() == pytest.approx(4000 / 3, rel=0.05)
    assert abs(np.corrcoef(order, np.arange(4000))[0, 1]) < 0.05


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


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 8))
def test_evaluation_sees_every_sample_once(samples, batch, world):
    ranks = [evaluation_positions(samples, batch, rank, world) for rank in range(world)]
    seen = [index for rank in ranks for part in rank for index in part.tolist()]
    assert sorted(seen) == list(range(samples))
    assert all(1 <= len(part) <= -(-batch // world) for rank in ranks for part in rank)


def test_batch_larger_than_the_dataset():
    with pytest.raises(FractalError, match=r"a batch of 8 is larger than the 7 training samples; lower --batch-size"):
        steps_per_epoch(7, 8, pad=True)


def test_world_that_does_not_divide_the_batch():
    with pytest.raises(FractalError, match=r"3 processes cannot share a batch of 64 equally; choose --batch-size 63"):
        rank_batch(64, 3)
    with pytest.raises(FractalError, match="choose --batch-size 4 "):
        rank_batch(2, 4)
