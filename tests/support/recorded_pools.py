"""Threads in the place of worker processes, and how many were asked for."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


class RecordedPools:
    """In the place of ``worker_pool``: remembers the sizes of the pools that were opened."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    @contextmanager
    def __call__(self, workers: int) -> Iterator[ThreadPoolExecutor]:
        self.sizes.append(workers)
        with ThreadPoolExecutor(workers) as pool:
            yield pool
