"""Samples that could not be read: said when the first one is met, counted for the end of the epoch."""

import sys
from collections.abc import Generator, Iterable

import torch

from fractaltrain.stream.loader import Batch
from fractaltrain.world import World


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
