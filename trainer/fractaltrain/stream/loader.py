"""Batches of an epoch, read and transformed in loader workers, in order, starting at any step."""

import math
import mmap
import multiprocessing
import os
import pickle
import socket
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fractalshards.errors import BadSampleError, FractalError, describe_os_error
from fractalshards.reader import Example
from fractalshards.workers import check_semaphores, end_with_parent, starting_loaders, watching
from fractaltrain.data.source import Images, Indices, SampleSource
from fractaltrain.seeding import Purpose, mix

Transform = Callable[[Images, int], Images]
"""Turns an image (H, W, 3) uint8 into (S, S, 3) uint8; its random numbers depend on the key alone."""

OnBad = Literal["stop", "replace", "drop"]

_PREFETCH = 4  # batches per worker
_MAX_BAD = 10_000  # bad samples in a row that are replaced


class Batch(NamedTuple):
    """Samples of one rank and step."""

    images: torch.Tensor  # (b, 3, S, S) uint8, channels last in memory
    labels: torch.Tensor  # class indices (b,) int64; of multi-label images (b, classes) float32, 1 for those shown
    keys: tuple[str, ...]  # names of the samples in their dataset
    sample_keys: npt.NDArray[np.uint64]  # (b,), keys of the samples' random numbers, from (seed, epoch, position)
    bad: tuple[str, ...]  # a message for each sample that could not be read


def epoch_loader(
    source: SampleSource,
    transform: Transform,
    positions: Sequence[Indices] | Indices,
    order: Indices,
    seed: int,
    epoch: int,
    *,
    start: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    on_bad: OnBad = "stop",
) -> Generator[Batch, None, None]:
    """Yield one rank's batches ``start``, ``start + 1``, ... of an epoch, the same ones for any number of workers.

    To leave the loop early, close the iterator (``contextlib.closing``): this ends the workers, which ignore the
    signals of batch systems. Raises FractalError if a sample cannot be read, or a loader worker is killed.

    Args:
        positions: positions in the order, one array per step, see ``order.training_positions``. Positions past the end
            wrap around.
        order: sample indices, see ``order.epoch_order``.
        start: first step.
        workers: loader processes; 0: load in this process.
        pin_memory: copy batches to page-locked memory, from which a GPU can fetch them.
        on_bad: what to do with a sample that cannot be read. ``stop``: raise the error; ``replace``: use the next
            readable sample of the order, augmented like the bad one; ``drop``: yield a smaller batch.
    """
    channels = [socket.socketpair() for _ in range(workers)]
    ends = tuple((here.fileno(), there) for here, there in channels)
    loader = DataLoader(
        _EpochBatches(source, transform, positions, order, seed, epoch, on_bad, ends),
        batch_size=None,  # an item is a whole batch
        sampler=range(start, len(positions)),
        collate_fn=_identity,
        num_workers=workers,
        prefetch_factor=_PREFETCH if workers else None,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # leaves the global generator alone
        worker_init_fn=lambda worker: end_with_parent(),
        multiprocessing_context="fork" if workers else None,  # spawning, the default of spawned ranks, takes seconds
    )
    if workers:
        check_semaphores()
    before = multiprocessing.active_children()
    items: Iterator[Batch | FractalError] = iter(())
    try:
        try:
            with starting_loaders():
                items = iter(loader)
        finally:  # also if some have started, and the next one cannot
            processes = [process for process in multiprocessing.active_children() if process not in before]
        while True:
            with watching(processes):
                item = next(items, None)
            if item is None:
                return
            if isinstance(item, FractalError):
                raise item
            yield item
    finally:
        del items  # ends the workers, which the traceback of an error would keep alive
        for process in processes:
            process.kill()  # if it hangs: workers ignore torch's SIGTERM, and Python would wait for them
        for end in chain(*channels):
            end.close()


@dataclass(frozen=True)
class _EpochBatches(Dataset["Batch | _Sent | FractalError"]):
    """A map-style dataset whose item k is the batch of step k."""

    source: SampleSource
    transform: Transform
    positions: Sequence[Indices] | Indices
    order: Indices
    seed: int
    epoch: int
    on_bad: OnBad
    channels: Sequence[tuple[int, socket.socket]]  # one per loader worker, see ``_send``

    def __getitem__(self, step: int) -> "Batch | _Sent | FractalError":
        """Return the batch, or the error: if a worker raised it, it would arrive as many lines of text."""
        worker = get_worker_info()
        try:
            batch = self._load(step)
            return _send(batch, *self.channels[worker.id]) if worker else batch
        except FractalError as error:
            return type(error)(*error.args)  # without its cause, which may not be picklable
        except OSError as error:
            return FractalError(describe_os_error(error))
        except MemoryError:
            return FractalError("no memory for a batch; lower --workers or --batch-size")

    def _load(self, step: int) -> Batch:
        positions: list[int] = self.positions[step].tolist()
        images = np.empty((0, 0, 0, 3), np.uint8)
        labels: list[int | tuple[int, ...]] = []
        keys: list[str] = []
        sample_keys: list[int] = []
        bad: list[str] = []
        for position in positions:
            example = self._read(position, bad)
            if example is None:
                continue
            sample_keys.append(mix(self.seed, Purpose.AUGMENT, self.epoch, position))
            image = self.transform(example.image, sample_keys[-1])
            if not keys:
                images = np.empty((len(positions), *image.shape), np.uint8)
            images[len(keys)] = image
            labels.append(example.label)
            keys.append(example.key)
        return Batch(
            torch.from_numpy(images[: len(keys)]).permute(0, 3, 1, 2),
            _label_tensor(labels, self.source.classes),
            tuple(keys),
            np.array(sample_keys, np.uint64),
            tuple(bad),
        )

    def _read(self, position: int, bad: list[str]) -> Example | None:
        """Read the sample at a position, or its replacement if ``on_bad`` asks for one; append problems to ``bad``."""
        samples = len(self.order)
        try:
            return self.source.read(int(self.order[position % samples]))
        except BadSampleError as error:
            if self.on_bad == "stop":
                raise
            bad.append(str(error))
        if self.on_bad == "drop":
            return None
        tries = min(_MAX_BAD, samples - 1)
        for later in range(position + 1, position + 1 + tries):
            with suppress(BadSampleError):
                return self.source.read(int(self.order[later % samples]))
        raise FractalError(f"none of the {tries:,} samples after a bad one can be read; is the dataset still there?")


class _Sent(NamedTuple):
    """Stands for a batch that a loader worker has sent; unpickling it receives the batch."""

    channel: int
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, tuple(self)


def _send(batch: Batch, channel: int, end: socket.socket) -> _Sent:
    """Send a batch from a loader worker as an anonymous file in memory.

    torch would use /dev/shm, which by default has 64 MB in a container. Only a short ``_Sent`` goes through the queue:
    a pipe takes it whole, so a worker that is killed never leaves half of one, for which the reader would wait forever.

    Args:
        channel: file descriptor of the receiver's end.
        end: the worker's end.
    """
    images = batch.images.permute(0, 2, 3, 1).numpy()
    with open(os.memfd_create("batch"), "w+b") as file:
        file.write(images.data)
        pickle.dump((batch.labels.numpy(), *batch[2:]), file)
        file.flush()
        socket.send_fds(end, [b"."], [file.fileno()])
    return _Sent(channel, images.shape)


def _receive(channel: int, shape: tuple[int, ...]) -> Batch:
    with socket.socket(fileno=os.dup(channel)) as end:
        _, (descriptor,), *_ = socket.recv_fds(end, 1, 1)
    with open(descriptor, "r+b") as file:
        memory = mmap.mmap(descriptor, 0)
        file.seek(math.prod(shape))
        labels, *others = pickle.load(file)
    images = np.frombuffer(memory, np.uint8, math.prod(shape)).reshape(shape)
    return Batch(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels), *others)


def _label_tensor(labels: Sequence[int | tuple[int, ...]], classes: int) -> torch.Tensor:
    if not labels or isinstance(labels[0], int):
        return torch.tensor(labels, dtype=torch.int64)
    shown = [torch.tensor(label, dtype=torch.int64) for label in labels]
    return torch.stack([torch.zeros(classes).index_fill(0, indices, 1) for indices in shown])


def _identity(item: Any) -> Any:
    return item
