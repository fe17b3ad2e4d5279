"""FractalDB's search for categories (Kataoka et al., ACCV 2020), on all cores, with the published result to the bit."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fractalgen.kataoka import fill_rate as measure
from fractalshards.errors import UsageError
from fractalshards.manifest import MAX_CLASSES
from fractalshards.workers import worker_pool

_POINTS = 100_000
_SIZE = 512
_MAX_FILL_RATE = 0.38  # with a pixel per point it would be 100,000 / 512**2 = 0.3815
_BATCH = 64  # candidates that a worker draws at a time, for some 50 ms
_AHEAD = 3  # batches per worker that are begun or wait to be, so that none is idle

State = Any  # of a numpy RandomState


@dataclass(frozen=True)
class Found:
    """A category: (maps, 7) float64; the number of the candidate that became it, from 1; the share of pixels hit.

    The share is kept to be held against that of the published search.
    """

    category: npt.NDArray[np.float64]
    candidate: int
    fill_rate: float


def search_categories(
    classes: int,
    seed: int = 1,
    fill_rate: float = 0.2,
    workers: int = 1,
    advance: Callable[[int], None] = lambda found: None,
) -> list[Found]:
    """Try random candidates one after the other until so many hit a large enough share of 512 x 512 pixels.

    The result is that of the published code for the same seed, whatever the number of workers; 1000 categories of
    seed 1 need 42,655 candidates.

    Args:
        classes: categories to find.
        seed: of numpy's ``RandomState``; the published one is 1.
        fill_rate: least share of pixels hit by 100,000 points, above 0. Few candidates hit more than 0.3, so that a
            search may take forever.
        workers: processes.
        advance: called again and again with the number of categories found since the last call, perhaps 0.

    Raises:
        UsageError: if an argument is out of its range.
        FractalError: if a worker was killed.
    """
    _check(classes, seed, fill_rate)
    found: list[Found] = []
    batches = _batches(seed)
    running: deque[Future[list[Found]]] = deque()
    with worker_pool(workers) as pool:
        while len(found) < classes:
            while len(running) < _AHEAD * workers:
                running.append(pool.submit(_try_batch, *next(batches), fill_rate))
            accepted = running.popleft().result()[: classes - len(found)]
            found += accepted
            advance(len(accepted))
    return found


def _check(classes: int, seed: int, fill_rate: float) -> None:
    if not 1 <= classes <= MAX_CLASSES:
        raise UsageError(f"classes is {classes}: a search finds 1 to {MAX_CLASSES:,} categories")
    if not 0 <= seed < 1 << 32:
        raise UsageError(f"seed is {seed}: the random numbers of a search have seeds of 0 to {(1 << 32) - 1}")
    if not 0 < fill_rate <= _MAX_FILL_RATE:
        raise UsageError(
            f"fill rate is {fill_rate:g}: expected above 0 and at most {_MAX_FILL_RATE}, for {_POINTS:,} points cannot "
            f"hit more of {_SIZE} x {_SIZE} pixels"
        )


def _batches(seed: int) -> Iterator[tuple[State, int]]:
    """Where in the random numbers each batch of candidates starts, and the number of its first candidate.

    There is no other way to that place than to draw all numbers before it. Drawing them is a third of the work; the
    workers do it again, for a state is smaller to send than what was drawn.
    """
    rng = np.random.RandomState(seed)
    first = 1
    while True:
        yield rng.get_state(), first
        for _ in range(_BATCH):
            _draw_candidate(rng)
        first += _BATCH


def _try_batch(state: State, first: int, fill_rate: float) -> list[Found]:
    """Those candidates of a batch that become categories."""
    rng = np.random.RandomState()
    rng.set_state(state)
    found = []
    for candidate in range(first, first + _BATCH):
        category, numbers = _draw_candidate(rng)
        rate = measure(category, numbers, _SIZE)
        if rate >= fill_rate:
            found.append(Found(category, candidate, rate))
    return found


def _draw_candidate(rng: np.random.RandomState) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The next candidate (maps, 7), and the (points,) random numbers that drive its orbit.

    2 to 7 maps with coefficients uniform in [-1, 1) and probabilities in proportion to |ad - bc|.
    """
    category = np.empty((rng.randint(2, 8), 7))
    for row in category:
        row[:6] = rng.uniform(-1, 1, 6)
    a, b, c, d, _, _, p = category.T
    p[:] = np.abs(a * d - b * c)
    p /= np.cumsum(p)[-1]  # added one after the other: sum() would round otherwise
    return category, rng.random_sample(_POINTS)
