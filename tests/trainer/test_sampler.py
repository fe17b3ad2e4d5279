"""``EpochSampler``: exact epochs for any training loop, which continue anywhere on any number of processes."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fractalshards.errors import UsageError
from fractaltrain import EpochSampler
from fractaltrain.stream.order import epoch_order, repeated, training_positions


class Shards(TensorDataset):
    """23 samples in three shards; a sample is its index."""

    lengths = (9, 4, 10)
    digest = "a dataset"

    def __init__(self) -> None:
        super().__init__(torch.arange(23))


DATA = Shards()


def sampler(**options) -> EpochSampler:
    return EpochSampler(DATA, **{"batch_size": 4, "seed": 3, "window": 2} | options)


def epoch(number: int, **options) -> list[list[int]]:
    """The batches of an epoch."""
    one = sampler(**options)
    one.set_epoch(number)
    return list(one)


def global_epoch(number: int, world: int, **options) -> list[list[int]]:
    """The global batches of an epoch, put together from those of all ranks."""
    parts = [epoch(number, rank=rank, world_size=world, **options) for rank in range(world)]
    return [[index for part in step for index in part] for step in zip(*parts, strict=True)]


@pytest.mark.parametrize(
    "options", [{}, {"pad": True}, {"passes": 3}, {"repeats": 2}, {"passes": 3, "repeats": 2, "pad": True}], ids=str
)
def test_epoch_is_that_of_the_trainer_on_any_number_of_ranks(options):
    passes, repeats, pad = options.get("passes", 1), options.get("repeats", 1), options.get("pad", False)
    for number in range(3):
        order = repeated(epoch_order(Shards.lengths, 3, number, 2, passes), repeats)
        positions = training_positions(len(order), 4, 0, 1, pad)
        expected = order[positions % len(order)].tolist()
        for world in (1, 2, 4):
            assert global_epoch(number, world, **options) == expected
        assert len(sampler(**options)) == len(expected)


def test_epoch_has_every_sample_once():
    for batch, world in product((1, 2, 4, 6, 12, 23), (1, 2)):
        if batch % world == 0:
            taken = [index for step in global_epoch(1, world, batch_size=batch) for index in step]
            assert len(taken) == len(set(taken)) == 23 // batch * batch
            padded = [index for step in global_epoch(1, world, batch_size=batch, pad=True) for index in step]
            assert set(padded) == set(range(23))


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
    assert [batch for number, _, batch in undisturbed if number == 1] == epoch(1)
    for number, step in ((1, 2),) if workers else product(range(3), range(5)):
        first, states = train(stop_at=(number, step), world=2)
        assert states[0] == states[1]
        rest, _ = train(states[0], world=4)
        assert first + rest == undisturbed


def test_state_without_step_counts_batches_that_workers_took_ahead():
    """Why a checkpoint names the steps that are done: workers have taken more."""
    ahead = sampler(batch_size=1)
    batches = iter(DataLoader(DATA, batch_sampler=ahead, num_workers=2, prefetch_factor=2))
    for _ in range(3):
        next(batches)
    assert ahead.state_dict(3)["step"] == 3
    assert ahead.state_dict()["step"] == 3 + 2 * 2
    exact = sampler(batch_size=1)
    batches = iter(DataLoader(DATA, batch_sampler=exact))
    for _ in range(3):
        next(batches)
    assert exact.state_dict() == exact.state_dict(3)


def test_step_belongs_to_the_loaded_epoch_alone():
    one = sampler()
    one.load_state_dict(sampler().state_dict(3))
    one.set_epoch(0)
    assert (one.epoch, one.step, list(one)) == (0, 3, epoch(0)[3:])
    assert one.step == 3
    assert list(one) == epoch(0)  # once more, from its beginning
    one.set_epoch(1)
    assert (one.step, list(one)) == (0, epoch(1))
    one.load_state_dict(sampler().state_dict(3))
    one.set_epoch(2)
    assert (one.step, list(one)) == (0, epoch(2))
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
