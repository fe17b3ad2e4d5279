"""Says which shards training needs next, whenever it comes to another window."""

import sys
import warnings
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fractalshards.errors import FractalError
from fractaltrain.data.source import BadSampleError, Example, Images, Source
from fractaltrain.distributed import World
from fractaltrain.preemption import prepare_worker
from fractaltrain.stream.bits import Bits, Purpose, mix
from fractaltrain.stream.order import Indices, shard_windows


@dataclass
class Ahead:
    """Follows a run through the windows of its epochs, see ``order``.

    Attributes:
        names: of the training shards.
        lengths: samples in each.
        seed: of the run.
        window: shards that are shuffled together.
        repeats: how often in a row each sample is taken, see ``order.repeated``.
        want: told the names of the shards of this window and then of the next one, in their order, once per window.
        part: positions of every epoch's order that this machine trains on; None: all.
    """

    names: Sequence[str]
    lengths: Sequence[int]
    seed: int
    window: int
    repeats: int
    want: Callable[[Sequence[str]], None]
    part: range | None = None
    _told: tuple[int, int] = field(default=(-1, -1), init=False)
    _ends: tuple[int, list[int]] = field(default=(-1, []), init=False)

    def reached(self, epoch: int, position: int) -> None:
        """Training has come to a position of an epoch's order; cheap where it is in the same window as before."""
        if self._ends[0] != epoch:
            self._ends = (epoch, self._window_ends(epoch))
        ends, (first, end) = self._ends[1], self._samples()
        windows = bisect_right(ends, end - 1) + 1  # up to the last one that is needed
        sample = position // self.repeats
        number = bisect_right(ends, sample) if sample < end else windows
        if self._told != (epoch, number):
            self._told = (epoch, number)
            following = self._windows(epoch + 1)[bisect_right(self._window_ends(epoch + 1), first)]
            upcoming = [*self._windows(epoch)[number:windows], following][:2]
            self.want([self.names[shard] for shards in upcoming for shard in shards])

    def _samples(self) -> tuple[int, int]:
        """The first sample of the order that is needed, and the end of the last."""
        all_of_them = sum(self.lengths) // self.repeats
        if self.part is None:
            return 0, all_of_them
        return min(self.part.start // self.repeats, all_of_them - 1), min(
            -(-self.part.stop // self.repeats), all_of_them
        )

    def _window_ends(self, epoch: int) -> list[int]:
        return list(accumulate(sum(self.lengths[shard] for shard in shards) for shards in self._windows(epoch)))

    def _windows(self, epoch: int) -> list[list[int]]:
        return [shards.tolist() for shards in shard_windows(len(self.lengths), self.seed, epoch, self.window)]


OnBad = Literal["stop", "replace", "drop"]

_PREFETCH = 4
_TRIES = 10_000  # of positions for one that is bad: more bad ones in a row mean that the dataset is gone


class Transform(Protocol):
    """Makes an image (H, W, 3) uint8 into (S, S, 3) uint8; any randomness comes from the key."""

    @property
    def image_size(self) -> int:
        """S, in pixels."""

    def __call__(self, image: Images, key: int, /) -> Images: ...


class Batch(NamedTuple):
    """Samples of one rank.

    Attributes:
        images: (b, 3, S, S) uint8; in memory the channels come last, as they are decoded.
        labels: (b,) int64; or (b, classes) float32, 1 for the classes shown, where images show several.
        keys: what the samples are called where they were read.
        sample_keys: (b,) uint64, random bits by (seed, epoch, position), for augmentation.
        bad: why samples could not be read that should be here.
    """

    images: torch.Tensor
    labels: torch.Tensor
    keys: tuple[str, ...]
    sample_keys: Bits
    bad: tuple[str, ...]


@dataclass(frozen=True)
class Loading:
    """How batches are fetched; none of it changes what is in them."""

    workers: int
    pin_memory: bool


class Batches(Dataset[Batch | FractalError]):
    """Item k is the k-th batch of a rank.

    Loader workers take items in turn, so batch k holds the same bits for any number of workers: the order is
    given, and augmentation is seeded by (seed, epoch, position) of each sample.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        positions: Sequence[Indices] | Indices,
        order: Indices,
        seed: int,
        epoch: int,
        on_bad: OnBad = "stop",
    ) -> None:
        """Read ``order[p % len(order)]`` for each position p of ``positions[k]``.

        Args:
            on_bad: what becomes of a sample that cannot be read. ``stop``: the end; ``replace``: the sample of the next
                position that can be read takes its place, so that batches keep their size and ranks their step, and
                do so after every restart; ``drop``: its batch is smaller.
        """
        self._source = source
        self._transform = transform
        self._positions = positions
        self._order = order
        self._seed = seed
        self._epoch = epoch
        self._on_bad = on_bad

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, step: int) -> Batch | FractalError:
        """The batch, or the error that reading it gave.

        The error is returned because torch's workers turn what they raise into a multi-line text.
        """
        positions: list[int] = self._positions[step].tolist()
        size = self._transform.image_size
        images = np.empty((len(positions), size, size, 3), np.uint8)
        labels: list[int | tuple[int, ...]] = []
        keys: list[str] = []
        sample_keys: list[int] = []
        bad: list[str] = []
        try:
            for position in positions:
                if example := self._read(position, bad):
                    sample_keys.append(mix(self._seed, Purpose.AUGMENT, self._epoch, position))
                    images[len(keys)] = self._transform(example.image, sample_keys[-1])
                    labels.append(example.label)
                    keys.append(example.key)
        except FractalError as error:
            return type(error)(*error.args)  # without its causes, not all of which can travel between processes
        planes = torch.from_numpy(images[: len(keys)]).permute(0, 3, 1, 2)
        return Batch(
            planes,
            _label_tensor(labels, self._source.classes),
            tuple(keys),
            np.array(sample_keys, np.uint64),
            tuple(bad),
        )

    def _read(self, position: int, bad: list[str]) -> Example | None:
        """The sample of a position or what stands for it, if anything; why it is bad is added to ``bad``."""
        try:
            return self._source.read(int(self._order[position % len(self._order)]))
        except BadSampleError as error:
            if self._on_bad == "stop":
                raise
            bad.append(str(error))
            return self._read_after(position) if self._on_bad == "replace" else None

    def _read_after(self, position: int) -> Example:
        tries = min(_TRIES, len(self._order) - 1)
        for later in range(position + 1, position + 1 + tries):
            with suppress(BadSampleError):
                return self._source.read(int(self._order[later % len(self._order)]))
        raise FractalError(f"none of the {tries:,} samples after a bad one can be read; is the dataset still there?")


def _label_tensor(labels: Sequence[int | tuple[int, ...]], classes: int) -> torch.Tensor:
    if not labels or isinstance(labels[0], int):
        return torch.tensor(labels, dtype=torch.int64)
    shown = torch.zeros(len(labels), classes)
    for row, some in zip(shown, labels, strict=True):
        row[torch.tensor(some)] = 1
    return shown


def iterate(batches: Batches, start: int, loading: Loading) -> Iterator[Batch]:
    """Batches ``start``, ``start + 1``, ... in order.

    Raises:
        FractalError: at the first sample that cannot be read and shall stop all, or if a loader worker is killed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # two long lines where there are more workers than cores
        items = iter(_loader(batches, start, loading))
    try:
        for item in items:
            if isinstance(item, FractalError):
                raise item
            yield item
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise FractalError(f"a loader worker died ({error}); if memory ran out, lower --workers") from error
    finally:
        del items  # workers end with it; the traceback of an error would keep it, and they ignore what ends processes


def _loader(batches: Batches, start: int, loading: Loading) -> DataLoader[Batch | FractalError]:
    return DataLoader(
        batches,
        batch_size=None,  # items are whole batches
        sampler=range(start, len(batches)),
        collate_fn=_as_it_is,
        num_workers=loading.workers,
        prefetch_factor=_PREFETCH if loading.workers else None,
        pin_memory=loading.pin_memory,
        generator=torch.Generator(),  # otherwise it would draw from the global one
        worker_init_fn=prepare_worker if loading.workers else None,
    )


def _as_it_is(item: Any) -> Any:
    return item


class BadSamples:
    """What one rank met in one pass over its batches, and what all ranks had met ``before`` it was interrupted."""

    def __init__(self, before: int = 0) -> None:
        self._before = before
        self._count = 0

    def noting(self, batches: Iterable[Batch]) -> Generator[Batch]:
        """The batches as they come, while their bad samples are counted; the first one is printed."""
        for batch in batches:
            if batch.bad and not self._count:
                print(f"bad sample, going on without it: {batch.bad[0]}", file=sys.stderr, flush=True)
            self._count += len(batch.bad)
            yield batch

    def total(self, world: World) -> int:
        """The number that all ranks met, before and now; all must ask."""
        return self._before + int(world.sum(torch.tensor(self._count, device=world.device)))
