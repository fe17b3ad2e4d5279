"""FractalDB's categories (Kataoka et al., ACCV 2020): shipped, read from files, or found by the published search."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fractalgen.kernels import MAX_MAPS
from fractalgen.kernels.fractaldb import fill_rate as measure
from fractalshards.errors import FractalError, UsageError
from fractalshards.human import human_list
from fractalshards.manifest import MAX_CLASSES
from fractalshards.storage import read_bounded
from fractalshards.systems import read_systems
from fractalshards.workers import OnProgress, no_progress, result_of, worker_pool

Category = npt.NDArray[np.float64]  # (maps, 7): a, b, c, d, e, f, p

_COLUMNS = "a, b, c, d, e, f, p"
_CSV_NAME = "[0-9]" * 5 + ".csv"
_MAX_CSV_BYTES = 1 << 20
_CHECK_POINTS, _CHECK_SIZE = 10_000, 128  # takes 0.04 ms
_BLACK = 0.02  # share of pixels; a straight line hits 0.01 of them, the published categories 0.21 and more

_log = logging.getLogger(__name__)


@cache
def shipped_categories() -> tuple[Category, ...]:
    """Return the 1000 published categories, bit for bit those that ``search_categories(1000)`` finds."""
    with as_file(files("fractalgen") / "data" / "fractaldb_categories.npz") as path:
        return read_categories(path)


def read_categories(path: Path) -> tuple[Category, ...]:
    """Read a file written by 'fractalgen search', in order of class.

    Raises FractalError if the file is damaged or holds something else.
    """
    categories = read_systems(path)
    faults = [f"category {index:05d}: {fault}" for index, one in enumerate(categories) if (fault := _fault(one))]
    if faults or not categories:
        raise FractalError(f"{path}: {[*faults, 'no categories'][0]}; write it with 'fractalgen search'")
    return categories


def read_csv_folder(folder: Path) -> tuple[Category, ...]:
    """Read a folder of CSV files as FractalDB publishes them: 00000.csv, 00001.csv, ... in it or its subfolders.

    Raises FractalError if there are none, a number is missing or occurs twice, or a file is not a category.
    """
    paths = sorted([*folder.glob(_CSV_NAME), *folder.glob(f"*/{_CSV_NAME}")], key=lambda path: (path.name, path))
    if not paths:
        raise FractalError(f"{folder}: no files 00000.csv, 00001.csv, ...; give the folder of FractalDB's CSV files")
    for index, path in enumerate(paths):
        if path.name != f"{index:05d}.csv":
            raise FractalError(f"{path}: expected {index:05d}.csv; number the files from 00000, each once")
    return tuple(read_csv(path) for path in paths)


def read_csv(path: Path) -> Category:
    """Read a category as FractalDB publishes it: a line per map with a, b, c, d, e, f and the probability p.

    Raises FractalError if a line is anything else.
    """
    text = read_bounded(path, _MAX_CSV_BYTES).decode("utf-8-sig", errors="replace")
    rows = [line for line in text.splitlines() if line.strip()]
    try:
        category = np.loadtxt(rows, delimiter=",", comments=None, ndmin=2) if rows else np.empty((0, 7))
        fault = _fault(category)
    except ValueError as error:
        fault = str(error)
    if fault:
        raise FractalError(f"{path}: {fault}; write a line '{_COLUMNS}' for each map")
    return category


def warn_of_black(categories: Sequence[Category], where: Path) -> None:
    """Log a warning that names the classes whose points hit so few pixels that images are nearly black."""
    numbers = np.random.RandomState(0).random_sample(_CHECK_POINTS)
    rates = [measure(category, numbers, _CHECK_SIZE) for category in categories]
    if black := [f"{index:05d}" for index, rate in enumerate(rates) if rate < _BLACK]:
        text = "%s: images of these classes are nearly black, as maps diverge, or shrink to a point or a line: %s"
        _log.warning(text, where, human_list(black))


def _fault(category: Category) -> str:
    """Say why an array is not a category; empty if it is one."""
    if category.ndim != 2 or category.shape[1] != 7 or not 1 <= len(category) <= MAX_MAPS:
        return f"an array of shape {category.shape}, not 1 to {MAX_MAPS} rows of {_COLUMNS}"
    if not np.isfinite(category).all():
        return "not every number is finite"
    if (category[:, 6] < 0).any() or not category[:, 6].any():
        return "a probability p is negative, or all are 0"
    return ""


_POINTS = 100_000
_SIZE = 512
_RATES = 1e-6, 0.38  # of pixels that a search may ask for: a pixel per point would be 100,000 / 512**2 = 0.3815
_BATCH = 64  # candidates per task, some 50 ms of work
_AHEAD = 3  # tasks submitted per worker, so that it is never idle

_State = Any  # of a numpy RandomState


@dataclass(frozen=True)
class Found:
    """A category, the number of its candidate, counted from 1, and the share of pixels that it hits."""

    category: Category
    candidate: int
    fill_rate: float


def search_categories(
    classes: int, seed: int = 1, fill_rate: float = 0.2, workers: int = 1, on_progress: OnProgress = no_progress
) -> list[Found]:
    """Try random candidates until enough of them hit the wanted share of 512 x 512 pixels.

    For the same seed, the result equals that of the published code, for any number of workers; 1000 categories of seed
    1 take 42,655 candidates. Raises UsageError if an argument is out of its range; FractalError if workers are killed
    repeatedly.

    Args:
        classes: number of categories to find.
        seed: seed of numpy's ``RandomState``, 0 to 2**32 - 1; the published one is 1.
        fill_rate: minimum share of pixels hit by 100,000 points, above 0. Few candidates hit more than 0.3, so a search
            for more may not end.
        workers: number of processes.
        on_progress: called with the number of categories found, and ``classes``.
    """
    ranges = {"classes": (classes, 1, MAX_CLASSES), "seed": (seed, 0, 2**32 - 1), "fill rate": (fill_rate, *_RATES)}
    for name, (value, low, high) in ranges.items():
        if not low <= value <= high:
            raise UsageError(f"{name} is {value}: a search takes {low} to {high}")
    found: list[Found] = []
    batches = _batches(seed)
    running: deque[Future[list[Found]]] = deque()
    with worker_pool(workers) as pool:
        while len(found) < classes:
            while len(running) < _AHEAD * workers:
                running.append(pool.submit(_try_batch, *next(batches), fill_rate))
            found += result_of(running.popleft())[: classes - len(found)]
            on_progress(len(found), classes)
    return found


def _batches(seed: int) -> Iterator[tuple[_State, int]]:
    """Yield the generator state at the start of each batch of candidates, and the number of its first candidate."""
    rng = np.random.RandomState(seed)
    for first in count(1, _BATCH):
        yield rng.get_state(), first  # smaller to send than the numbers, although drawing is a third of the work
        for _ in range(_BATCH):
            _draw_candidate(rng)


def _try_batch(state: _State, first: int, fill_rate: float) -> list[Found]:
    """Return the candidates of a batch that become categories."""
    rng = np.random.RandomState()
    rng.set_state(state)
    drawn = ((candidate, *_draw_candidate(rng)) for candidate in range(first, first + _BATCH))
    tried = (Found(category, candidate, measure(category, numbers, _SIZE)) for candidate, category, numbers in drawn)
    return [one for one in tried if one.fill_rate >= fill_rate]


def _draw_candidate(rng: np.random.RandomState) -> tuple[Category, npt.NDArray[np.float64]]:
    """Draw the next candidate, (maps, 7) with 2 to 7 maps, and the (points,) random numbers that drive its orbit."""
    category = np.empty((rng.randint(2, 8), 7))
    for row in category:
        row[:6] = rng.uniform(-1, 1, 6)
    a, b, c, d, _, _, p = category.T
    p[:] = np.abs(a * d - b * c)
    p /= np.cumsum(p)[-1]  # added in order; sum() would round differently
    return category, rng.random_sample(_POINTS)
