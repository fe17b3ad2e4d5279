"""Tables that all processes of a machine share: computed once, then mapped from ``tables/`` in the user's cache."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash
from filelock import FileLock

from fractalshards.storage import atomic_file, private_cache, remove_leftovers
from fractalshards.workers import OnProgress, available_cores

Table = npt.NDArray[np.uint32]

_ROWS = 5  # computed by a chain before it waits for the others


def shared_table(
    identity: tuple[object, ...], shape: tuple[int, int], chains: Sequence[Iterator[Table]], on_progress: OnProgress
) -> Table:
    """Return a table from the cache, read-only; the first process that needs it computes it while others wait.

    ``identity`` is all that determines the table, including the version of the code. ``chains`` iterate over the rows
    of equal, consecutive parts of the table; they advance side by side on all cores, so they should release the GIL.
    ``on_progress`` is called with the rows computed and all rows. Raises FractalError if others can write to the cache.
    """
    root = private_cache(scratch=True)
    if root is None:
        return _compute(shape, chains, on_progress)
    path = root / "tables" / f"{xxhash.xxh3_128_hexdigest(repr((identity, shape)).encode())}.npy"
    if (table := _read(path, shape)) is not None:
        return table
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if (table := _read(path, shape)) is None:
            remove_leftovers(path.parent)
            table = _compute(shape, chains, on_progress)
            with atomic_file(path) as file:
                np.save(file, table)
    return table


def _read(path: Path, shape: tuple[int, int]) -> Table | None:
    """Map a table into memory; None if it is missing or damaged."""
    with suppress(FileNotFoundError, ValueError, EOFError):
        table: Table = np.asarray(np.load(path, mmap_mode="r"))
        if table.shape == shape and table.dtype == np.uint32:
            return table
    return None


def _compute(shape: tuple[int, int], chains: Sequence[Iterator[Table]], on_progress: OnProgress) -> Table:
    table = np.empty(shape, np.uint32)
    parts = table.reshape(len(chains), -1, shape[1])
    with ThreadPoolExecutor(available_cores()) as threads:
        for first in range(0, parts.shape[1], _ROWS):
            rows = threads.map(lambda chain: list(islice(chain, _ROWS)), chains)
            parts[:, first : first + _ROWS] = list(rows)
            on_progress(len(chains) * min(first + _ROWS, parts.shape[1]), len(table))
    return table
