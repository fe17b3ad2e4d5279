"""Batches of an epoch, read and transformed by loader workers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from fractalshards.errors import FractalError
from fractaltrain.data.source import Images, Source
from fractaltrain.preemption import ignore_stop_signals
from fractaltrain.stream.bits import Purpose, mix
from fractaltrain.stream.order import Indices

_PREFETCH = 4

Transform = Callable[[Images], torch.Tensor]
"""Turns an image (H, W, 3) uint8 into a tensor (3, S, S) uint8; any randomness comes from torch's CPU generator."""


class Batch(NamedTuple):
    """Samples of one rank: images (b, 3, S, S) uint8, labels (b,) int64, and the keys they were read from."""

    images: torch.Tensor
    labels: torch.Tensor
    keys: tuple[str, ...]


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
    ) -> None:
        """Read ``order[p % len(order)]`` for each position p of ``positions[k]``."""
        self._source = source
        self._transform = transform
        self._positions = positions
        self._order = order
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, step: int) -> Batch | FractalError:
        """The batch, or the error that reading it gave.

        The error is returned because torch's workers turn what they raise into a multi-line text.
        """
        images, labels, keys = [], [], []
        try:
            for position in self._positions[step].tolist():
                example = self._source.read(int(self._order[position % len(self._order)]))
                with seeded(mix(self._seed, Purpose.AUGMENT, self._epoch, position)):
                    images.append(self._transform(example.image))
                labels.append(example.label)
                keys.append(example.key)
        except FractalError as error:
            return error
        return Batch(torch.stack(images), torch.tensor(labels), tuple(keys))


def iterate(batches: Batches, start: int, loading: Loading) -> Iterator[Batch]:
    """Batches ``start``, ``start + 1``, ... in order.

    Raises:
        FractalError: at the first sample that cannot be read, or if a loader worker is killed.
    """
    loader = DataLoader(
        batches,
        batch_size=None,  # items are whole batches
        sampler=range(start, len(batches)),
        collate_fn=_as_it_is,
        num_workers=loading.workers,
        prefetch_factor=_PREFETCH if loading.workers else None,
        pin_memory=loading.pin_memory,
        generator=torch.Generator(),  # otherwise it would draw from the global one
        worker_init_fn=ignore_stop_signals if loading.workers else None,
    )
    try:
        for item in loader:
            if isinstance(item, FractalError):
                raise item
            yield item
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise FractalError(f"a loader worker died ({error}); if memory ran out, lower --workers") from error


@contextmanager
def seeded(key: int) -> Iterator[None]:
    """Run with torch's CPU generator seeded by ``key``, and put it back as it was."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(key)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def _as_it_is(item: Any) -> Any:
    return item
