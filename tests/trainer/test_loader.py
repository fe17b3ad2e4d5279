import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from fractalshards.errors import FractalError
from fractalshards.manifest import load_manifest, read_record
from fractaltrain.data.shards import ShardSource
from fractaltrain.data.source import ArraySource, BadSampleError, Example
from fractaltrain.recipes import FT_RECIPES, PT_RECIPES
from fractaltrain.stream.loader import Batches, Loading, OnBad, iterate
from fractaltrain.stream.order import epoch_order, training_positions
from fractaltrain.transforms import evaluation_geometry, training_geometry

CPU = torch.device("cpu")
AFFINE = training_geometry(FT_RECIPES["anderson"], 32, CPU)


def shard_batches(folder: Path, epoch: int = 0, seed: int = 0, transform=AFFINE) -> Batches:
    source = ShardSource(load_manifest(folder), "train")
    order = epoch_order(source.lengths, seed, epoch, window=2)
    return Batches(source, transform, training_positions(50, 10, 0, 1, pad=False), order, seed, epoch)


def read(batches: Batches, start: int = 0, workers: int = 0) -> list:
    return list(iterate(batches, start, Loading(workers, pin_memory=False)))


def same(first: list, second: list) -> bool:
    return len(first) == len(second) and all(
        a.keys == b.keys and torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(first, second, strict=True)
    )


def test_batches_are_the_samples_of_the_shards(dataset):
    batches = read(shard_batches(dataset, transform=evaluation_geometry(PT_RECIPES["anderson"], 32)))
    assert [batch.images.shape for batch in batches] == [(10, 3, 32, 32)] * 5
    assert batches[0].images.dtype == torch.uint8
    assert sorted(key for batch in batches for key in batch.keys) == [f"{index:09d}" for index in range(50)]
    source = ShardSource(load_manifest(dataset), "train")
    for batch in batches:
        for image, label, key in zip(batch.images, batch.labels, batch.keys, strict=True):
            assert int(label) == int(key) % 5
            assert np.array_equal(image.permute(1, 2, 0).numpy(), source.read(int(key)).image)


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_bits(dataset, workers):
    assert same(read(shard_batches(dataset)), read(shard_batches(dataset), workers=workers))


def test_one_shard_and_eight_workers_give_an_exact_epoch(one_shard):
    batches = read(shard_batches(one_shard), workers=8)
    assert len(batches) == 5
    assert sorted(key for batch in batches for key in batch.keys) == [f"{index:09d}" for index in range(50)]
    assert same(batches, read(shard_batches(one_shard)))


@pytest.mark.parametrize(("start", "workers"), [(1, 0), (3, 2), (5, 0)])
def test_resuming_gives_the_rest_of_the_epoch(dataset, start, workers):
    assert same(read(shard_batches(dataset))[start:], read(shard_batches(dataset), start, workers))


def test_augmentation_differs_between_epochs_seeds_and_samples():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    source = ArraySource("one", np.stack([image] * 4), np.zeros(4, np.int64), 1)

    def batch(seed: int, epoch: int) -> torch.Tensor:
        batches = Batches(source, AFFINE, np.arange(4)[None], np.arange(4), seed, epoch)
        return read(batches)[0].images

    images = torch.cat([batch(0, 0), batch(0, 1), batch(1, 0)])
    assert len(torch.unique(images, dim=0)) == 12
    assert torch.equal(batch(0, 1), images[4:8])


def test_augmentation_leaves_the_global_generator_alone(dataset):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    read(shard_batches(dataset))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_sample_is_named(dataset, tmp_path, workers):
    folder = tmp_path / "bad"
    shutil.copytree(dataset, folder)
    start = read_record(folder, "train-000001.tar", "single").offsets[4]  # sample 4 of the second shard is number 24
    with (folder / "train-000001.tar").open("r+b") as file:
        file.seek(start + 512 + 60)
        file.write(b"garbage" * 20)
    with pytest.raises(FractalError) as error:
        read(shard_batches(folder), workers=workers)
    assert str(error.value).startswith(f"{folder}/train-000001.tar: 000000024: image cannot be decoded")
    assert "\n" not in str(error.value)


def test_label_outside_the_classes_is_named(tmp_path, dataset):
    folder = tmp_path / "bad"
    shutil.copytree(dataset, folder)
    info = (folder / "_info.json").read_text()
    (folder / "_info.json").write_text(info.replace('"classes": 5', '"classes": 3'))
    with pytest.raises(FractalError, match=r"train-00000\d\.tar: \d+: label [34], but there are 3 classes"):
        read(shard_batches(folder))


def test_vanished_shard_is_named(tmp_path, dataset):
    folder = tmp_path / "gone"
    shutil.copytree(dataset, folder)
    batches = shard_batches(folder)
    (folder / "train-000002.tar").unlink()
    with pytest.raises(FractalError, match=r"train-000002\.tar: .*No such file"):
        read(batches)


class Named:
    """Samples whose images are one pixel, and of which some cannot be read."""

    def __init__(self, lengths: tuple[int, ...], bad: frozenset[int] = frozenset(), there: bool = True) -> None:
        self.lengths = lengths
        self.classes = 1
        self.bad = bad
        self.there = there

    def read(self, index: int) -> Example:
        if not self.there:
            raise FractalError("the server does not answer")
        if index in self.bad:
            raise BadSampleError(f"sample {index} is bad")
        return Example(str(index), np.full((1, 1, 3), index, np.uint8), 0)


def named_batches(source: Named, batch: int, rank: int, world: int, pad: bool, on_bad: OnBad = "stop") -> Batches:
    order = epoch_order(source.lengths, seed=0, epoch=0, window=2)
    positions = training_positions(len(order), batch, rank, world, pad)
    return Batches(source, evaluation_geometry(PT_RECIPES["anderson"], 1), positions, order, 0, 0, on_bad)


def test_law_4_in_a_small_box_of_workers_and_ranks():
    """Workers take the batches of a rank in turn, each with a copy of its own: the epoch is exact for any number."""
    for lengths, batch, pad in product([(1, 3), (2, 1, 2), (6,)], range(1, 5), (False, True)):
        order = epoch_order(lengths, seed=0, epoch=0, window=2)
        for world in (world for world in (1, 2, 3, 4) if batch % world == 0):
            for workers in (1, 2, 3, 8):
                seen: list[list[str]] = []
                for rank in range(world):
                    copies = [named_batches(Named(lengths), batch, rank, world, pad) for _ in range(workers)]
                    read = [copies[step % workers][step] for step in range(len(copies[0]))]
                    seen.append([key for one in read for key in one.keys])
                steps = -(-sum(lengths) // batch) if pad else sum(lengths) // batch
                rows = np.array(seen).reshape(world, steps, -1).transpose(1, 0, 2).ravel()
                assert rows.tolist() == [str(order[p % len(order)]) for p in range(steps * batch)]


def test_a_bad_sample_is_replaced_by_the_next_good_one():
    source = Named((6, 6))
    order = epoch_order(source.lengths, seed=0, epoch=0, window=2).tolist()
    bad = frozenset([order[2], order[5], order[6], order[11]])
    expected = [*order[:2], order[3], order[3], order[4], order[7], order[7], *order[7:11], order[0]]
    for world in (1, 2, 4):
        ranks = [named_batches(Named((6, 6), bad), 4, rank, world, False, "replace") for rank in range(world)]
        seen = [int(key) for step in range(3) for rank in ranks for key in rank[step].keys]
        assert seen == expected
        reasons = [reason for rank in ranks for step in range(3) for reason in rank[step].bad]
        assert sorted(reasons) == sorted(f"sample {index} is bad" for index in bad)


def test_a_replacement_is_augmented_as_its_place_is():
    source = Named((6, 6))
    order = epoch_order(source.lengths, seed=0, epoch=0, window=2).tolist()
    good, mended = (
        named_batches(Named((6, 6), bad), 4, 0, 1, False, "replace")[0] for bad in (frozenset(), frozenset([order[2]]))
    )
    assert np.array_equal(good.sample_keys, mended.sample_keys)
    assert len(set(good.sample_keys.tolist())) == 4


def test_a_bad_sample_drops_out_of_an_evaluation():
    batches = named_batches(Named((6,), frozenset([1, 2])), 3, 0, 1, False, "drop")
    seen = [batches[step] for step in range(2)]
    assert sorted(int(key) for batch in seen for key in batch.keys) == [0, 3, 4, 5]
    assert sum(len(batch.images) for batch in seen) == sum(len(batch.labels) for batch in seen) == 4
    everything = named_batches(Named((3,), frozenset([0, 1, 2])), 3, 0, 1, False, "drop")[0]
    assert (everything.images.shape, len(everything.labels), len(everything.bad)) == ((0, 3, 1, 1), 0, 3)


def test_a_dataset_that_is_gone_stops_even_those_who_skip():
    with pytest.raises(FractalError, match="none of the 5 samples after a bad one can be read; is the dataset still"):
        read(named_batches(Named((6,), frozenset(range(6))), 3, 0, 1, False, "replace"))
    for on_bad in ("replace", "drop"):
        with pytest.raises(FractalError, match="the server does not answer"):
            read(named_batches(Named((6,), there=False), 3, 0, 1, False, on_bad))


def test_a_shard_cut_in_mid_epoch_is_replaced_or_named(tmp_path, dataset):
    folder = tmp_path / "cut"
    shutil.copytree(dataset, folder)
    source = ShardSource(load_manifest(folder), "train")
    order = epoch_order(source.lengths, 0, 0, window=2)
    positions = training_positions(50, 10, 0, 1, pad=False)
    batches = {how: Batches(source, AFFINE, positions, order, 0, 0, how) for how in ("stop", "replace")}
    stream = {how: iterate(batches[how], 0, Loading(0, pin_memory=False)) for how in batches}
    first = {how: next(stream[how]) for how in stream}
    assert not first["replace"].bad
    os.truncate(folder / "train-000000.tar", 700)
    with pytest.raises(FractalError, match=r"train-000000\.tar: sample \d+: file ends at byte"):
        list(stream["stop"])
    rest = list(stream["replace"])
    lost = [index for index in order[10:] if index < 20]
    assert [len(batch.keys) for batch in rest] == [10] * 4
    assert sum(len(batch.bad) for batch in rest) == len(lost) > 3
    assert not {f"{index:09d}" for index in lost} & {key for batch in rest for key in batch.keys}


class Deadly(ArraySource):
    def read(self, index: int) -> Example:
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


def test_killed_worker_is_one_line():
    source = Deadly("deadly", np.zeros((8, 32, 32, 3), np.uint8), np.zeros(8, np.int64), 1)
    batches = Batches(
        source, evaluation_geometry(PT_RECIPES["anderson"], 32), np.arange(8).reshape(4, 2), np.arange(8), 0, 0
    )
    with pytest.raises(FractalError, match=r"^a loader worker died .*lower --workers$"):
        read(batches, workers=1)


ORPHANS = """
import multiprocessing, os
import numpy as np
from fractaltrain.data.source import ArraySource
from fractaltrain.transforms import evaluation_geometry
from fractaltrain.recipes import PT_RECIPES
from fractaltrain.stream.loader import Batches, Loading, iterate
source = ArraySource("long" * 10_000, np.zeros((40, 8, 8, 3), np.uint8), np.zeros(40, np.int64), 1)
positions = np.arange(40).reshape(20, 2)
batches = Batches(source, evaluation_geometry(PT_RECIPES["anderson"], 8), positions, np.arange(40), 0, 0)
stream = iterate(batches, 0, Loading(2, pin_memory=False))
next(stream)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
input()
"""


def test_workers_end_with_a_killed_parent_though_nobody_takes_their_batches():
    """The names of their samples fill the pipe that they write to, and each holds the end that is read."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", ORPHANS], text=True, **pipes) as parent:
        assert parent.stdout is not None
        workers = [int(worker) for worker in parent.stdout.readline().split()]
        ends = [os.pidfd_open(worker) for worker in workers]
        parent.kill()
        try:
            assert [select.select([end], [], [], 20)[0] for end in ends] == [[end] for end in ends] != []
        finally:
            for end in ends:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(end, signal.SIGKILL)
                os.close(end)


def test_open_files_stay_few_and_are_closed(dataset, monkeypatch):
    monkeypatch.setattr("fractaltrain.data.shards._OPEN_FILES", 2)
    before = set(os.listdir("/proc/self/fd"))
    source = ShardSource(load_manifest(dataset), "train")
    for index in (0, 20, 33, 1, 21, 34):  # one sample of each shard, twice
        source.read(index)
        assert len(set(os.listdir("/proc/self/fd")) - before) <= 2
    del source
    assert set(os.listdir("/proc/self/fd")) <= before
