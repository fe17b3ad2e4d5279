"""Order of an epoch: every law is held by exhausting small cases, randomness by statistics."""

import doctest
import hashlib
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractalshards.errors import UsageError
from fractalshards.random import permutation
from fractaltrain.seeding import mix
from fractaltrain.stream import order as module
from fractaltrain.stream.loader import PrefetchSchedule
from fractaltrain.stream.order import (
    epoch_order,
    epoch_samples,
    evaluation_positions,
    node_positions,
    rank_batch,
    repeated,
    shard_windows,
    training_positions,
)

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
WORDS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4)


@given(WORDS, WORDS)
def test_mix_gives_different_words_different_keys(first, second):
    assert 0 <= mix(*first) < 2**64
    assert (mix(*first) == mix(*second)) == (first == second)


def test_permutations_are_equally_frequent():
    drawn = Counter(tuple(permutation(4, mix(key)).tolist()) for key in range(4800))
    assert len(drawn) == 24
    assert sum((count - 200) ** 2 / 200 for count in drawn.values()) < 50  # chi square, 23 degrees of freedom


def test_docstring_example():
    assert doctest.testmod(module).failed == 0


def test_order_never_changes():
    """A stopped run must find its order again after any update: these bits are a promise."""
    order = epoch_order([1000] * 7, seed=3, epoch=11, window=2)
    assert hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] == "f5e0d1fbc5e67f43"


@given(LENGTHS, st.integers(0, 2**63 - 1), st.integers(0, 1000), st.integers(1, 15))
def test_order_takes_one_window_of_shards_after_the_other(lengths, seed, epoch, window):
    order = epoch_order(lengths, seed, epoch, window)
    shard_of, start = np.repeat(np.arange(len(lengths)), lengths)[order], 0
    for shards in shard_windows(len(lengths), seed, epoch, window):
        end = start + sum(lengths[shard] for shard in shards)
        assert sorted(set(shard_of[start:end].tolist())) == sorted(shards.tolist())
        start = end
    assert sorted(order.tolist()) == list(range(sum(lengths)))


def test_order_differs_between_epochs_and_seeds():
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
def test_window_mixes_its_shards(window):
    """Two neighbours share their shard as often as two samples drawn from a window of W shards do."""
    _, shard = shuffled(window)
    expected = (LENGTH - 1) / (window * LENGTH - 1)
    chance = 4 * (expected / len(shard)) ** 0.5
    assert np.mean(shard[1:] == shard[:-1]) == pytest.approx(expected, abs=max(chance, SHARDS / len(shard)))


@pytest.mark.parametrize("window", [2, 4, 16])
def test_window_spreads_the_samples_of_a_shard_evenly(window):
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


def test_windows_of_other_epochs_hold_other_shards():
    """How often two shards meet is spread as chance does it: no pair is favoured, and none is kept apart."""
    pairs: Counter[tuple[int, int]] = Counter()
    for epoch in range(30):
        _, shard = shuffled(4, epoch)
        for samples in shard.reshape(-1, 4 * LENGTH):
            pairs.update(combinations(np.unique(samples).tolist(), 2))
    times = np.array([pairs[pair] for pair in combinations(range(SHARDS), 2)])
    assert times.var() / times.mean() == pytest.approx(1 - 3 / (SHARDS - 1), abs=0.15)  # of 30 draws with p = 3 / 63


@pytest.mark.parametrize("window", [1, 4, 64])
def test_samples_of_a_shard_change_their_order_with_the_epoch(window):
    """Rank correlations between two epochs, and with the index, are those of chance: of N(0, 1 / n) for n samples."""
    place, later = (np.argsort(shuffled(window, epoch)[0]).reshape(SHARDS, LENGTH) for epoch in (0, 1))
    index = np.arange(LENGTH)
    for correlations in (list(map(rank_correlation, place, later)), [rank_correlation(row, index) for row in place]):
        assert np.std(correlations) == pytest.approx(LENGTH**-0.5, rel=0.4)
        assert abs(np.mean(correlations)) < 4 * (LENGTH * SHARDS) ** -0.5


def test_window_of_all_shards_is_a_full_shuffle():
    order, _ = shuffled(SHARDS)
    other, _ = shuffled(SHARDS, epoch=1)
    bound = 4 / len(order) ** 0.5
    assert abs(rank_correlation(order, np.arange(len(order)))) < bound
    assert abs(rank_correlation(np.argsort(order), np.argsort(other))) < bound
    assert np.abs(np.diff(order)).mean() == pytest.approx(len(order) / 3, rel=0.03)


def test_repeated_order_takes_the_first_samples_in_runs():
    for samples, repeats in product(range(1, 13), range(1, 5)):
        order = epoch_order([samples], seed=1, epoch=2, window=1)
        again = repeated(order, repeats)
        assert len(again) == epoch_samples(samples, repeats)
        chosen = order[: samples // repeats]
        assert np.array_equal(again.reshape(len(chosen), repeats), np.stack([chosen] * repeats, axis=1))


CASES = [
    (samples, batch, nodes, local, pad)
    for samples, batch, (nodes, local), pad in product(
        range(1, 26), range(1, 13), ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1)), (False, True)
    )
    if batch <= samples and batch % (nodes * local) == 0
]


def test_epoch_is_exact_in_every_small_case():
    """Law 4: all ranks take the same number of steps, global batches do not depend on the number of ranks of a machine,
    and every sample counts once; with padding the last batch is filled with the first samples."""
    for samples, batch, nodes, local, pad in CASES:
        world = nodes * local
        ranks = [training_positions(samples, batch, rank, world, pad, nodes) for rank in range(world)]
        steps = -(-samples // batch) if pad else samples // batch
        assert {rank.shape for rank in ranks} == {(steps, batch // world)}
        for node in range(nodes):
            mine = np.concatenate(ranks[node * local : (node + 1) * local], axis=1)
            assert mine.ravel().tolist() == list(node_positions(samples, batch, node, nodes, pad))
        everything = np.sort(np.concatenate(ranks, axis=1).ravel())
        assert everything.tolist() == list(range(steps * batch))
        assert len(everything) - samples < batch
        assert steps * batch >= samples if pad else steps * batch <= samples


SMALL = [lengths for count in (1, 2, 3) for lengths in product((1, 2, 4), repeat=count)]


def test_epoch_continues_with_other_ranks_in_every_small_case():
    """After a stop at any step, any number of ranks trains on the rest of the epoch."""
    for lengths, window, pad in product(SMALL, (1, 2), (False, True)):
        samples = sum(lengths)
        order = epoch_order(lengths, seed=1, epoch=0, window=window)
        for batch in range(1, samples + 1):
            runs = []
            for world in (world for world in (1, 2, 3, 4) if batch % world == 0):
                ranks = [training_positions(samples, batch, rank, world, pad) for rank in range(world)]
                runs.append(order[np.concatenate(ranks, axis=1) % samples])
            for run, stop in product(runs, range(len(runs[0]))):
                assert np.array_equal(np.concatenate([runs[0][:stop], run[stop:]]), runs[0])


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 8))
def test_evaluation_takes_every_sample_once(samples, batch, world):
    ranks = [evaluation_positions(samples, batch, rank, world) for rank in range(world)]
    assert sorted(index for rank in ranks for some in rank for index in some.tolist()) == list(range(samples))
    assert all(1 <= len(some) <= -(-batch // world) for rank in ranks for some in rank)


@pytest.mark.parametrize(("batch", "world", "possible"), [(64, 3, 63), (2, 4, 4)])
def test_batch_that_ranks_cannot_share_is_refused(batch, world, possible):
    with pytest.raises(UsageError, match=f"--batch-size {possible} "):
        rank_batch(batch, world)


@pytest.mark.parametrize("repeats", [1, 3])
def test_prefetch_schedule_names_this_window_and_the_next(repeats):
    lengths, window, seed = [4, 2, 3, 5, 1], 2, 3
    schedule = PrefetchSchedule(lengths, seed, window, repeats)
    windows = [[shards.tolist() for shards in shard_windows(5, seed, epoch, window)] for epoch in range(3)]
    for epoch in range(2):
        sample_windows = [
            number for number, shards in enumerate(windows[epoch]) for _ in range(sum(lengths[s] for s in shards))
        ]
        last = sample_windows[epoch_samples(15, repeats) // repeats - 1]
        for position in range(epoch_samples(15, repeats)):
            number = sample_windows[position // repeats]
            following = windows[epoch][number + 1] if number < last else windows[epoch + 1][0]
            assert schedule.shards(epoch, position) == tuple(dict.fromkeys(windows[epoch][number] + following))


@pytest.mark.parametrize("lengths", [(4, 4, 4, 4), (3, 5, 2, 7), (1, 1, 9), (10,)])
def test_prefetch_schedule_has_what_a_machine_reads_next(lengths):
    """For any window, repeats, number of machines and padding: the shard of the next sample, and after the last one the
    shard with which the next epoch begins."""
    shard_of = np.repeat(np.arange(len(lengths)), lengths)
    for window, repeats, nodes, pad in product((1, 2, 3), (1, 2, 3), (1, 2, 3), (False, True)):
        samples, batch = epoch_samples(len(shard_of), repeats), 6
        steps = -(-samples // batch) if pad else samples // batch
        shards = [shard_of[repeated(epoch_order(lengths, 1, epoch, window), repeats)] for epoch in range(3)]
        for node in range(nodes):
            mine = node_positions(samples, batch, node, nodes, pad)
            schedule = PrefetchSchedule(lengths, 1, window, repeats, mine)
            for epoch, step in product(range(2), range(steps + 1)):
                position = mine.start + step * batch // nodes
                found = schedule.shards(epoch, position)
                if step == steps:
                    epoch, position = epoch + 1, mine.start
                if position < samples:  # later ones fill the last batch and are fetched when they are read
                    assert shards[epoch][position] in found
