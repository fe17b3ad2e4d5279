"""Batches of an epoch: the same for any number of workers and after any stop, bad samples, workers that end."""

import errno
import gc
import multiprocessing
import os
import pickle
import select
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from building import children_of
from damages import overwrite
from fractalshards.errors import BadSampleError, FractalError
from fractalshards.manifest import load_manifest, read_record
from fractalshards.reader import Example, StoredSplit
from fractaltrain.data.source import InMemorySource
from fractaltrain.recipes import FT_RECIPES, PT_RECIPES
from fractaltrain.stream.loader import Batch, OnBad, epoch_loader
from fractaltrain.stream.order import epoch_order, training_positions
from fractaltrain.transforms import train_transform, val_transform
from tiny_training import Deadly

AFFINE = train_transform(FT_RECIPES["anderson"], 32)
PLAIN = val_transform(PT_RECIPES["anderson"], 32)


def read(folder: Path, transform=AFFINE, on_bad: OnBad = "stop", **loading: int) -> list[Batch]:
    """The batches of 10 of an epoch of the 50 training samples in a folder."""
    source = StoredSplit(load_manifest(folder), "train")
    order = epoch_order(source.lengths, 0, 0, window=2)
    positions = training_positions(50, 10, 0, 1, pad=False)
    return list(epoch_loader(source, transform, positions, order, 0, 0, on_bad=on_bad, **loading))


def test_batches_hold_the_samples_of_the_shards(dataset):
    batches = read(dataset, PLAIN)
    assert [batch.images.shape for batch in batches] == [(10, 3, 32, 32)] * 5
    assert batches[0].images.dtype == torch.uint8
    assert sorted(key for batch in batches for key in batch.keys) == [f"{index:09d}" for index in range(50)]
    source = StoredSplit(load_manifest(dataset), "train")
    for batch in batches:
        for image, label, key in zip(batch.images, batch.labels, batch.keys, strict=True):
            assert int(label) == int(key) % 5
            assert np.array_equal(image.permute(1, 2, 0).numpy(), source.read(int(key)).image)


@pytest.mark.parametrize(("start", "workers"), [(0, 1), (0, 8), (1, 0), (3, 2), (5, 0)])
def test_batches_from_any_start_do_not_depend_on_the_number_of_workers(dataset, start, workers):
    for batch, expected in zip(read(dataset, start=start, workers=workers), read(dataset)[start:], strict=True):
        assert batch.keys == expected.keys
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.labels, expected.labels)


def test_augmentation_differs_between_epochs_seeds_and_samples():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    source = InMemorySource("one", np.stack([image] * 4), np.zeros(4, np.int64), 1)

    def images(seed: int, epoch: int) -> torch.Tensor:
        return next(epoch_loader(source, AFFINE, np.arange(4)[None], np.arange(4), seed, epoch)).images

    together = torch.cat([images(0, 0), images(0, 1), images(1, 0)])
    assert len(torch.unique(together, dim=0)) == 12
    assert torch.equal(images(0, 1), together[4:8])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_sample_is_named_in_one_line(dataset, tmp_path, workers):
    damaged, labelled = (shutil.copytree(dataset, tmp_path / name) for name in ("damaged", "labelled"))
    start = read_record(damaged, "train-000001.tar", "single").offsets[4]
    overwrite(damaged / "train-000001.tar", start + 512 + 60, b"garbage" * 20)
    info = (labelled / "_info.json").read_text()
    (labelled / "_info.json").write_text(info.replace('"classes": 5', '"classes": 3'))
    for folder, noun in ((damaged, "000000024: "), (labelled, r"\d+: label [34]")):
        with pytest.raises(FractalError, match=rf"train-00000\d\.tar: {noun}") as error:
            read(folder, workers=workers)
        assert "\n" not in str(error.value)


def test_shard_that_is_lost_or_cut_during_an_epoch(tmp_path, dataset):
    folder = shutil.copytree(dataset, tmp_path / "cut")
    source = StoredSplit(load_manifest(folder), "train")
    order = epoch_order(source.lengths, 0, 0, window=2)
    positions = training_positions(50, 10, 0, 1, pad=False)
    loaders = {how: epoch_loader(source, PLAIN, positions, order, 0, 0, on_bad=how) for how in ("stop", "replace")}
    assert all(not next(loader).bad for loader in loaders.values())
    os.truncate(folder / "train-000000.tar", 700)
    with pytest.raises(FractalError, match=r"train-000000\.tar: sample \d+"):
        list(loaders["stop"])
    rest = list(loaders["replace"])
    lost = [index for index in order[10:] if index < 20]
    assert [len(batch.keys) for batch in rest] == [10] * 4
    assert sum(len(batch.bad) for batch in rest) == len(lost) > 3
    assert not {f"{index:09d}" for index in lost} & {key for batch in rest for key in batch.keys}
    (folder / "train-000002.tar").unlink()
    with pytest.raises(FractalError, match=r"train-000002\.tar: "):
        pickle.loads(pickle.dumps(source)).read(40)  # as a spawned worker does, which has no open files


class Numbers:
    """Samples whose key and pixel are their index, and of which some, or all, cannot be read."""

    classes = 1

    def __init__(self, lengths: tuple[int, ...], bad: frozenset[int] = frozenset(), gone: bool = False) -> None:
        self.lengths, self.bad, self.gone = lengths, bad, gone

    def read(self, index: int) -> Example:
        if self.gone:
            raise FractalError("the server does not answer")
        if index in self.bad:
            raise BadSampleError(f"sample {index} is bad")
        return Example(str(index), np.full((1, 1, 3), index, np.uint8), 0)


def numbers(source: Numbers, batch: int, rank: int = 0, world: int = 1, **loading: object) -> list[Batch]:
    order = epoch_order(source.lengths, seed=0, epoch=0, window=2)
    positions = training_positions(len(order), batch, rank, world, pad=False)
    one_pixel = val_transform(PT_RECIPES["anderson"], 1)
    return list(epoch_loader(source, one_pixel, positions, order, 0, 0, **loading))


@pytest.mark.parametrize("start", [0, 2])
def test_bad_sample_is_replaced_by_the_next_good_one(start):
    source = Numbers((6, 6))
    order = epoch_order(source.lengths, seed=0, epoch=0, window=2).tolist()
    bad = frozenset([order[2], order[5], order[6], order[11]])
    expected = [*order[:2], order[3], order[3], order[4], order[7], order[7], *order[7:11], order[0]]
    for world in (1, 2, 4):
        options = {"on_bad": "replace", "start": start}
        ranks = [numbers(Numbers((6, 6), bad), 4, rank, world, **options) for rank in range(world)]
        seen = [int(key) for step in range(3 - start) for rank in ranks for key in rank[step].keys]
        assert seen == expected[4 * start :]
        reasons = sorted(reason for rank in ranks for batch in rank for reason in batch.bad)
        assert reasons == sorted(f"sample {index} is bad" for index in bad & set(order[4 * start :]))


def test_replacement_is_augmented_like_the_bad_sample():
    order = epoch_order((6, 6), seed=0, epoch=0, window=2).tolist()
    good = numbers(Numbers((6, 6)), 4)[0]
    mended = numbers(Numbers((6, 6), frozenset([order[2]])), 4, on_bad="replace")[0]
    assert np.array_equal(good.sample_keys, mended.sample_keys)
    assert len(set(good.sample_keys.tolist())) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_sample_is_dropped_from_an_evaluation(workers):
    batches = numbers(Numbers((6,), frozenset([1, 2])), 3, on_bad="drop", workers=workers)
    assert sorted(int(key) for batch in batches for key in batch.keys) == [0, 3, 4, 5]
    assert sum(len(batch.images) for batch in batches) == sum(len(batch.labels) for batch in batches) == 4
    (empty,) = numbers(Numbers((3,), frozenset([0, 1, 2])), 3, on_bad="drop", workers=workers)
    assert (len(empty.images), len(empty.labels), empty.keys, len(empty.bad)) == (0, 0, (), 3)


def test_lost_dataset_is_an_error_even_if_bad_samples_are_replaced():
    with pytest.raises(FractalError, match="dataset"):
        numbers(Numbers((6,), frozenset(range(6))), 3, on_bad="replace")
    for on_bad in ("replace", "drop"):
        with pytest.raises(FractalError, match="the server does not answer"):
            numbers(Numbers((6,), gone=True), 3, on_bad=on_bad)


def zeros(workers: int, kind: type[InMemorySource] = InMemorySource) -> Iterator[Batch]:
    """20 batches of two samples."""
    source = kind("zeros", np.zeros((40, 32, 32, 3), np.uint8), np.zeros(40, np.int64), 1)
    return epoch_loader(source, PLAIN, np.arange(40).reshape(20, 2), np.arange(40), 0, 0, workers=workers)


def test_killed_worker_is_one_line():
    with pytest.raises(FractalError, match="--workers") as error:
        list(zeros(workers=1, kind=Deadly))
    assert "\n" not in str(error.value)


@pytest.fixture
def no_child_handler():
    """Python's own handling of SIGCHLD; torch's stays for good once a test has used a plain DataLoader."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


def test_worker_that_is_killed_while_a_batch_is_used_fails_the_next_one(no_child_handler):
    before = {*children_of()}
    with closing(zeros(workers=1)) as loader:
        next(loader)
        (worker,) = {*children_of()} - before
        ended = os.pidfd_open(worker)
        os.kill(worker, signal.SIGKILL)  # no error here: torch's handler of SIGCHLD would raise one anywhere
        assert select.select([ended], [], [], 20)[0]
        os.close(ended)
        with pytest.raises(FractalError, match="SIGKILL"):
            list(loader)


def test_batches_of_workers_need_no_space_in_dev_shm():
    with closing(zeros(workers=1)) as loader:
        batch = next(loader)
        assert "/dev/shm/torch" not in Path("/proc/self/maps").read_text()
    batch.images.add_(1)  # it outlives its worker
    assert batch.images.sum() == 2 * 3 * 32 * 32


def test_worker_that_cannot_send_a_batch_says_why(monkeypatch):
    monkeypatch.setattr(os, "memfd_create", Mock(side_effect=OSError(errno.ENFILE, "Too many open files in system")))
    with pytest.raises(FractalError, match="open files"):
        list(zeros(workers=1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of torch's iterator, half created
def test_workers_end_if_another_one_cannot_start(monkeypatch):
    before = {*children_of()}
    forks = [os.fork, Mock(side_effect=BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"))]
    monkeypatch.setattr(os, "fork", lambda: forks.pop(0)())
    with pytest.raises(OSError, match="unavailable") as caught:
        list(zeros(workers=2))
    for process in multiprocessing.active_children():
        process.join(10)
    assert not {*children_of()} - before, caught  # whose traceback refers to the workers
    del caught
    gc.collect()


def test_closed_loader_ends_its_workers_though_they_ignore_sigterm():
    before = {*children_of()}
    with closing(zeros(workers=2)) as loader:
        next(loader), next(loader)  # both have started
        workers = {*children_of()} - before
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
        assert len(list(loader)) == 18
    assert not workers & {*children_of()}


def signal_when_forked(monkeypatch: pytest.MonkeyPatch, parent: bool, *numbers: signal.Signals) -> None:
    """Send signals to one of the two processes right after a fork, when Python ignores the exceptions of handlers."""
    fork = os.fork

    def fork_and_signal() -> int:
        pid = fork()
        if bool(pid) == parent:
            with suppress(KeyboardInterrupt):
                for number in numbers:
                    os.kill(os.getpid(), number)
        return pid

    monkeypatch.setattr(os, "fork", fork_and_signal)


def test_new_workers_ignore_signals_to_all_processes(monkeypatch):
    signal_when_forked(monkeypatch, False, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    assert len(list(zeros(workers=2))) == 20


def test_ctrl_c_while_workers_start_is_not_lost(monkeypatch):
    before = {*children_of()}
    signal_when_forked(monkeypatch, True, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        list(zeros(workers=2))
    assert not {*children_of()} - before


def test_workers_end_with_a_killed_parent():
    """Each holds the reading end of the pipe that it writes to."""
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            loader = zeros(workers=2)
            next(loader), next(loader)
            os.write(writer, " ".join(map(str, children_of())).encode())
            signal.pause()
        finally:
            os._exit(1)
    ends = [os.pidfd_open(int(worker)) for worker in os.read(reader, 100).split()]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        assert [select.select([end], [], [], 20)[0] for end in ends] == [[end] for end in ends] != []
    finally:
        for end in ends:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(end, signal.SIGKILL)
            os.close(end)
        os.close(reader), os.close(writer)


def test_open_files_stay_few_and_are_closed(dataset):
    before = set(os.listdir("/proc/self/fd"))
    source = StoredSplit(load_manifest(dataset), "train", max_open_files=2)
    for index in (0, 20, 33, 1, 21, 34):  # one sample of each shard, twice
        source.read(index)
        assert len(set(os.listdir("/proc/self/fd")) - before) <= 2
    del source
    assert set(os.listdir("/proc/self/fd")) <= before
