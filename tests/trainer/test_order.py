"""Order of an epoch, and ``EpochSampler``: laws in all small cases, randomness with statistics."""

import doctest
import hashlib
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from fractalshards.errors import UsageError
from fractalshards.random import permutation
from fractaltrain import EpochSampler
from fractaltrain.seeding import mix
from fractaltrain.stream import order as module
from fractaltrain.stream.order import (
    PrefetchSchedule,
    epoch_order,
    epoch_samples,
    evaluation_positions,
    node_positions,
    repeated,
    shard_windows,
    training_positions,
)

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


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


@given(LENGTHS, st.integers(1, 4), st.integers(0, 5), st.integers(1, 3))
def test_passes_are_whole_epochs_one_after_the_other(lengths, passes, epoch, window):
    numbers = range(epoch * passes, (epoch + 1) * passes)
    single = [epoch_order(lengths, 7, number, window) for number in numbers]
    assert epoch_order(lengths, 7, epoch, window, passes).tolist() == np.concatenate(single).tolist()
    fresh = epoch_order(lengths, 7, epoch, window, passes, fresh=True)
    samples = sum(lengths)
    assert sorted(fresh.tolist()) == list(range(numbers.start * samples, numbers.stop * samples))
    assert (fresh % samples).tolist() == np.concatenate(single).tolist()


SHARDS, LENGTH = 64, 250  # samples of a shard


def shuffled(window: int, epoch: int = 0) -> np.ndarray:
    """The shards of the samples in the order of an epoch."""
    return epoch_order([LENGTH] * SHARDS, seed=5, epoch=epoch, window=window) // LENGTH


@pytest.mark.parametrize("window", [1, 2, 4, 16, 64])
def test_window_mixes_its_shards(window):
    """Two neighbours share their shard as often as two samples drawn from a window of W shards do."""
    shard = shuffled(window)
    expected = (LENGTH - 1) / (window * LENGTH - 1)
    chance = 4 * (expected / len(shard)) ** 0.5
    assert np.mean(shard[1:] == shard[:-1]) == pytest.approx(expected, abs=max(chance, SHARDS / len(shard)))


def test_windows_of_other_epochs_hold_other_shards():
    """Two shards share a window as often as by chance: no pair is favoured, and none is kept apart."""
    pairs: Counter[tuple[int, int]] = Counter()
    for epoch in range(30):
        for samples in shuffled(4, epoch).reshape(-1, 4 * LENGTH):
            pairs.update(combinations(np.unique(samples).tolist(), 2))
    times = np.array([pairs[pair] for pair in combinations(range(SHARDS), 2)])
    assert times.var() / times.mean() == pytest.approx(1 - 3 / (SHARDS - 1), abs=0.15)  # of 30 draws with p = 3 / 63


def test_repeated_order_takes_the_first_samples_in_runs():
    for samples, repeats in product(range(1, 13), range(1, 5)):
        order = epoch_order([samples], seed=1, epoch=2, window=1)
        again = repeated(order, repeats)
        assert len(again) == epoch_samples(samples, repeats)
        chosen = order[: samples // repeats]
        assert np.array_equal(again.reshape(len(chosen), repeats), np.stack([chosen] * repeats, axis=1))


MACHINES = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1))  # their number, and ranks on each


def test_epoch_is_exact_in_every_small_case():
    """Law 4: all ranks take the same number of steps, and every sample counts once; with padding the last batch is
    filled with the first samples. Global batches do not depend on the number of ranks of a machine, so any number of
    ranks can continue a stopped epoch."""
    for samples, batch, (nodes, local), pad in product(range(1, 26), range(1, 13), MACHINES, (False, True)):
        world = nodes * local
        if batch > samples or batch % world:
            continue
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


@given(st.integers(0, 60), st.integers(1, 20), st.integers(1, 8))
def test_evaluation_takes_every_sample_once(samples, batch, world):
    ranks = [evaluation_positions(samples, batch, rank, world) for rank in range(world)]
    assert sorted(index for rank in ranks for some in rank for index in some.tolist()) == list(range(samples))
    assert all(1 <= len(some) <= -(-batch // world) for rank in ranks for some in rank)


def test_prefetch_schedule_names_this_window_and_the_next():
    lengths, seed = [4, 2, 3, 5, 1], 3
    schedule = PrefetchSchedule(lengths, seed, 2, repeats=1, passes=1)
    windows = [shards.tolist() for epoch in range(3) for shards in shard_windows(5, seed, epoch, 2)]  # three per epoch
    for epoch in range(2):
        positions = iter(range(sum(lengths)))
        for number in range(3 * epoch, 3 * epoch + 3):
            expected = tuple(dict.fromkeys(windows[number] + windows[number + 1]))
            for _ in range(sum(lengths[shard] for shard in windows[number])):
                assert schedule.shards(epoch, next(positions)) == expected


@pytest.mark.parametrize("lengths", [(4, 4, 4, 4), (3, 5, 2, 7), (1, 1, 9), (10,)])
def test_prefetch_schedule_has_what_a_machine_reads_next(lengths):
    """The schedule holds the shard of the next sample, and after the last sample the shard that starts the next epoch.

    This holds for every window, number of repeats, number of machines and padding.
    """
    shard_of = np.repeat(np.arange(len(lengths)), lengths)
    for window, repeats, nodes, pad, passes in product((1, 3), (1, 2, 3), (1, 2, 3), (False, True), (1, 3)):
        samples, batch = epoch_samples(len(shard_of), repeats, passes), 6
        steps = -(-samples // batch) if pad else samples // batch
        orders = [epoch_order(lengths, 1, epoch, window, passes) for epoch in range(3)]
        shards = [shard_of[repeated(order, repeats)] for order in orders]
        for node in range(nodes):
            mine = node_positions(samples, batch, node, nodes, pad)
            schedule = PrefetchSchedule(lengths, 1, window, repeats, passes, mine)
            for epoch, step in product(range(2), range(steps + 1)):
                position = mine.start + step * batch // nodes
                found = schedule.shards(epoch, position)
                if step == steps:
                    epoch, position = epoch + 1, mine.start
                if position < samples:  # later ones fill the last batch and are fetched when they are read
                    assert shards[epoch][position] in found


# EpochSampler


class Shards(TensorDataset):
    """23 samples in three shards; a sample is its index."""

    lengths = (9, 4, 10)
    digest = "a dataset"

    def __init__(self) -> None:
        super().__init__(torch.arange(23))


DATA = Shards()


def sampler(**options) -> EpochSampler:
    return EpochSampler(DATA, **{"batch_size": 4, "seed": 3, "window": 2} | options)


def batches(number: int, **options) -> list[list[int]]:
    """The batches of an epoch."""
    one = sampler(**options)
    one.set_epoch(number)
    return list(one)


def global_epoch(number: int, world: int, **options) -> list[list[int]]:
    """The global batches of an epoch, put together from those of all ranks."""
    parts = [batches(number, rank=rank, world_size=world, **options) for rank in range(world)]
    return [[index for part in step for index in part] for step in zip(*parts, strict=True)]


@pytest.mark.parametrize(
    "options", [{}, {"pad": True}, {"passes": 3}, {"repeats": 2}, {"passes": 3, "repeats": 2, "pad": True}], ids=str
)
def test_epoch_is_that_of_the_trainer_on_any_number_of_ranks(options):
    passes, repeats, pad = options.get("passes", 1), options.get("repeats", 1), options.get("pad", False)
    for number, batch in product(range(3), (1, 2, 4, 6, 12, 22)):
        order = repeated(epoch_order(Shards.lengths, 3, number, 2, passes), repeats)
        positions = training_positions(len(order), batch, 0, 1, pad)
        expected = order[positions % len(order)].tolist()
        for world in (world for world in (1, 2, 4) if batch % world == 0):
            assert global_epoch(number, world, batch_size=batch, **options) == expected
        assert len(sampler(batch_size=batch, **options)) == len(expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_continues_inside_an_epoch_on_other_ranks(workers):
    """The loop of the documentation, stopped after every step that there is."""

    def train(state=None, stop_at=None, world=1):
        done = []
        ranks = [sampler(rank=rank, world_size=world) for rank in range(world)]
        if state is not None:
            for one in ranks:
                one.load_state_dict(state)
        for number in range(ranks[0].epoch, 3):
            for one in ranks:
                one.set_epoch(number)
            loaders = [DataLoader(DATA, batch_sampler=one, num_workers=workers) for one in ranks]
            for step, parts in enumerate(zip(*loaders, strict=True), ranks[0].step):
                done.append((number, step, torch.cat([part[0] for part in parts]).tolist()))
                if stop_at == (number, step):
                    return done, [one.state_dict(step + 1) for one in ranks]
        return done, None

    undisturbed, _ = train()
    assert [batch for number, _, batch in undisturbed if number == 1] == batches(1)
    for number, step in ((1, 2),) if workers else product(range(3), range(5)):
        first, states = train(stop_at=(number, step), world=2)
        assert states[0] == states[1]
        rest, _ = train(states[0], world=4)
        assert first + rest == undisturbed


def test_state_without_step_is_that_of_the_batches_taken():
    one = sampler(batch_size=1)
    for _ in zip(range(3), DataLoader(DATA, batch_sampler=one), strict=False):
        pass
    assert one.state_dict() == one.state_dict(3)


def test_step_belongs_to_the_loaded_epoch_alone():
    one = sampler()
    one.load_state_dict(sampler().state_dict(3))
    one.set_epoch(0)
    assert (one.epoch, one.step, list(one)) == (0, 3, batches(0)[3:])
    assert one.step == 3
    assert list(one) == batches(0)  # once more, from its beginning
    one.set_epoch(1)
    assert (one.step, list(one)) == (0, batches(1))
    one.load_state_dict(sampler().state_dict(3))
    one.set_epoch(2)
    assert (one.step, list(one)) == (0, batches(2))
    assert len(one) == 5
    finished = sampler().state_dict(5)
    assert (finished["epoch"], finished["step"]) == (1, 0)


def test_state_of_another_order_is_refused():
    state = sampler().state_dict(2)
    others = ({"seed": 4}, {"batch_size": 2}, {"window": 3}, {"passes": 2}, {"repeats": 2}, {"pad": True})
    for options in others:
        with pytest.raises(UsageError, match=next(iter(options))):
            sampler(**options).load_state_dict(state)
    other = Shards()
    other.digest = "another"
    with pytest.raises(UsageError, match="dataset"):
        EpochSampler(other, 4, seed=3, window=2).load_state_dict(state)
    for damage in ({"step": 6}, {"step": -1}, {"epoch": "0"}, {"step": None}):
        with pytest.raises(UsageError, match=next(iter(damage))):
            sampler().load_state_dict(state | damage)
    sampler(rank=1, world_size=2).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "noun"),
    [
        ({"batch_size": 24}, "batch"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 3, "rank": 0, "world_size": 2}, "batch"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"rank": 0}, "world_size"),
        ({"world_size": 2}, "rank"),
        ({"seed": -1}, "seed"),
        ({"window": 0}, "window"),
        ({"passes": 0}, "passes"),
        ({"repeats": 24}, "batch"),
    ],
)
def test_wrong_arguments_are_refused(options, noun):
    with pytest.raises(UsageError, match=noun):
        sampler(**options)
    with pytest.raises(UsageError, match="epoch"):
        sampler().set_epoch(-1)
    with pytest.raises(UsageError, match="step"):
        sampler().state_dict(6)


def test_any_map_style_dataset_has_exact_epochs():
    plain = EpochSampler(TensorDataset(torch.arange(10)), batch_size=5)
    assert sorted(np.concatenate(list(plain)).tolist()) == list(range(10))


def test_rank_comes_from_torch_distributed(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="init_process_group"):
        sampler()
    assert sampler(rank=1, world_size=2).rank == 1
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        joined = sampler()
        assert (joined.rank, joined.world_size) == (0, 1)
    finally:
        torch.distributed.destroy_process_group()
