"""``--nodes-split``: every machine reads its own part of an epoch, and the epoch stays exact."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from fractalshards.errors import UsageError
from fractaltrain.distributed import World
from fractaltrain.stream.loader import Ahead
from fractaltrain.stream.order import epoch_order, epoch_samples, node_positions, repeated, training_positions


def test_every_small_epoch_is_exact_and_machines_have_parts_of_their_own():
    for samples, batch, (nodes, local), pad in product(
        range(1, 30), range(1, 13), ((2, 1), (2, 2), (3, 1)), (False, True)
    ):
        world = nodes * local
        if batch > samples or batch % world:
            continue
        ranks = [training_positions(samples, batch, rank, world, pad, nodes) for rank in range(world)]
        steps = -(-samples // batch) if pad else samples // batch
        assert {rank.shape for rank in ranks} == {(steps, batch // world)}
        for node in range(nodes):
            mine = np.concatenate(ranks[node * local : (node + 1) * local], axis=1)
            assert mine.ravel().tolist() == list(node_positions(samples, batch, node, nodes, pad))
        assert sorted(np.concatenate(ranks, axis=1).ravel().tolist()) == list(range(steps * batch))


def test_a_machine_has_the_shards_of_its_part_fetched_and_no_others():
    lengths, names = [4] * 6, [f"s{number}" for number in range(6)]
    said: list[list[str]] = []
    part = node_positions(24, 4, 1, 2, pad=False)
    ahead = Ahead(names, lengths, seed=3, window=1, repeats=1, want=lambda some: said.append([*some]), part=part)
    needed = [[f"s{sample // 4}" for sample in epoch_order(lengths, 3, epoch, 1)[12::4]] for epoch in range(3)]
    for epoch in range(2):
        for step in range(7):
            ahead.reached(epoch, part.start + step * 2)
    expected = []
    for epoch in range(2):
        sequence = [*needed[epoch], needed[epoch + 1][0]]
        expected += [sequence[number : number + 2] for number in range(4)]
    assert said == expected


@pytest.mark.parametrize("lengths", [(4, 4, 4, 4), (3, 5, 2, 7), (1, 1, 9), (10,)])
def test_what_a_machine_needs_next_is_always_asked_for(lengths):
    """Whatever window, repeats and padding: the shard of its next sample, and at the end that of the next epoch's."""
    shard_of = np.repeat(np.arange(len(lengths)), lengths)
    for window, repeats, nodes, pad in product((1, 2, 3), (1, 2, 3), (1, 2, 3), (False, True)):
        samples, batch = epoch_samples(len(shard_of), repeats), 6
        steps = -(-samples // batch) if pad else samples // batch
        shards = [shard_of[repeated(epoch_order(lengths, 1, epoch, window), repeats)] for epoch in range(3)]
        for node in range(nodes):
            part = node_positions(samples, batch, node, nodes, pad)
            said: list[list[int]] = []
            ahead = Ahead(range(len(lengths)), lengths, 1, window, repeats, said.append, part)
            for epoch, step in product(range(2), range(steps + 1)):
                position = part.start + step * batch // nodes
                ahead.reached(epoch, position)
                if step == steps:
                    epoch, position = epoch + 1, part.start
                if position < samples:  # what pads the end is fetched when it is read
                    assert shards[epoch][position] in said[-1]


def test_machines_with_other_numbers_of_processes_are_refused(monkeypatch):
    world = World(rank=0, size=6, local_size=4, device=None)
    monkeypatch.setattr(World, "gather", lambda self, value: [4, 4, 4, 4, 2, 2])
    with pytest.raises(
        UsageError, match=r"^--nodes-split needs equally many processes on every machine; start it so, or drop it$"
    ):
        world.nodes()


def test_two_machines(world, fractaltrain, write_dataset, tmp_path):
    """Each trains on whole shards that the other does not read; the run continues on as many machines only."""
    dataset = write_dataset(tmp_path / "four", train=(12, 12, 12, 12))
    arguments = (
        "pt", "--shards", dataset, "--out", tmp_path / "run", "--model", "test_resnet", "--epochs", 1,
        "--batch-size", 8, "--image-size", 16, "--window", 1, "--nodes-split",
    )  # fmt: skip
    done = world(2, *arguments, nodes=2, record=True)
    assert done.codes == [0, 0], done.said()
    order = epoch_order([12] * 4, seed=0, epoch=0, window=1)
    for rank in range(2):
        seen = [int(key) for line in read_lines(done.folder / f"keys-{rank}.jsonl") for key in line[1:]]
        assert seen == order[24 * rank : 24 * (rank + 1)].tolist()
    refused = fractaltrain(*arguments)
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "holds a run with nodes_split 2, not without; choose another folder" in refused.err


def read_lines(path: Path) -> list[list]:
    return [json.loads(line) for line in path.read_text().splitlines()]
