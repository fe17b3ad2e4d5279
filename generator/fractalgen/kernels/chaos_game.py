"""The chaos game: random orbits of an iterated function system, sixteen interleaved, in float32."""

import numpy as np
import numpy.typing as npt
from numba import njit

from fractalgen.kernels import CACHE, MAX_MAPS
from fractalgen.kernels.random import Key, hash32
from fractalshards.errors import UsageError

Bytes = npt.NDArray[np.uint8]
Float32s = npt.NDArray[np.float32]

_LANES = 16  # independent orbits; one alone waits for the latency of its own multiplications
_FEW = 4  # maps whose coefficients fit into registers; the published systems have no more
_HEAD = 256  # points of one orbit before it splits into lanes, so that the path from the start appears once


def chaos_game(system: npt.NDArray[np.float64], points: int, key: Key) -> tuple[Float32s, Float32s]:
    """Compute points of the attractor of an IFS by random iteration (Barnsley 1988).

    Starts at the fixed point of map 0, which lies on the attractor, and keeps all points from there, as the published
    code does: where map 0 is rarely drawn, its first points are far out and widen the bounding box. After 256 points
    the orbit splits into sixteen. Every step draws a map with probability proportional to |det A|; if all determinants
    are zero, all maps are equally likely. Raises UsageError if there are no maps, or more than 255.

    Args:
        system: (n, 2, 3) float64, n in 1..255; row i of map k is (a, b, e) with x_i' = a x + b y + e.
        points: number of points, at least 1.
        key: key for ``hash32``; the choice at step t depends on (key, t) alone.

    Returns:
        x and y, each (points,) float32. Systems that are not contractive may reach infinity or NaN.
    """
    if not 1 <= len(system) <= MAX_MAPS:
        raise UsageError(f"{len(system)} maps: a system has 1 to {MAX_MAPS}")
    total = max(_HEAD, -(-points // _LANES) * _LANES)
    choices = np.empty(total, np.uint8)
    _choose_maps(_thresholds(system), *key, choices)
    xs, ys = np.empty(total, np.float32), np.empty(total, np.float32)
    maps = system.reshape(-1, 6).astype(np.float32)
    xs[_HEAD - 1], ys[_HEAD - 1] = fixed_point(system[0])  # which the first point follows, as the one before it
    _iterate(maps, choices, xs[:_HEAD], ys[:_HEAD], 0, 1)
    if len(system) <= _FEW:
        _iterate_few(np.resize(maps, (_FEW, 6)), choices, xs, ys)
    else:
        _iterate(maps, choices, xs, ys, _HEAD, _LANES)
    return xs[:points], ys[:points]


def fixed_point(affine: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Return the fixed point of an affine map (2, 3), or the origin if there is none or more than one."""
    (a, b, e), (c, d, f) = affine.tolist()
    determinant = (1 - a) * (1 - d) - b * c
    if determinant == 0:
        return 0.0, 0.0
    return ((1 - d) * e + b * f) / determinant, ((1 - a) * f + c * e) / determinant


def determinants(system: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return |det A| of every map of a system (n, 2, 3), as (n,) float64."""
    return np.abs(system[:, 0, 0] * system[:, 1, 1] - system[:, 0, 1] * system[:, 1, 0])


def _thresholds(system: npt.NDArray[np.float64]) -> npt.NDArray[np.uint32]:
    """Cumulative probabilities of all maps but the last, in units of 2**-32."""
    weights = determinants(system)
    if not 0 < weights.sum() < np.inf:
        weights = np.ones(len(system))
    shares: npt.NDArray[np.float64] = np.cumsum(weights[:-1]) / weights.sum()
    return np.minimum(shares * 2.0**32, 2.0**32 - 1).astype(np.uint32)


@njit(cache=CACHE)
def _choose_maps(thresholds: npt.NDArray[np.uint32], key0: np.uint32, key1: np.uint32, choices: Bytes) -> None:
    """choices[i] = the map whose share of [0, 2**32) the i-th random word falls into."""
    choices[:] = 0
    for k in range(len(thresholds)):  # a pass each, which computes the words anew, vectorises; an inner loop would not
        threshold = thresholds[k]
        for i in range(len(choices)):
            choices[i] += np.uint8(hash32(np.uint32(i), key0, key1) >= threshold)


@njit(cache=CACHE)
def _iterate(maps: Float32s, choices: Bytes, xs: Float32s, ys: Float32s, first: int, lanes: int) -> None:
    """Compute the points from number ``first`` on; point i follows point i - lanes, and point 0 the last one."""
    for i in range(first, len(xs)):
        k = choices[i]
        x, y = xs[i - lanes], ys[i - lanes]
        xs[i] = maps[k, 0] * x + maps[k, 1] * y + maps[k, 2]
        ys[i] = maps[k, 3] * x + maps[k, 4] * y + maps[k, 5]


@njit(cache=CACHE)
def _iterate_few(maps: Float32s, choices: Bytes, xs: Float32s, ys: Float32s) -> None:
    """``_iterate`` for four maps: coefficients are selected instead of looked up, so that the lanes vectorise."""
    a, b, e = _column(maps, 0), _column(maps, 1), _column(maps, 2)
    c, d, f = _column(maps, 3), _column(maps, 4), _column(maps, 5)
    lanes = np.uint64(_LANES)  # unsigned, because numba checks signed indices for negative values
    for step in range(_HEAD // _LANES, len(xs) // _LANES):
        first = np.uint64(step) * lanes
        before = first - lanes
        for lane in range(_LANES):
            i, j = first + np.uint64(lane), before + np.uint64(lane)
            k, x, y = choices[i], xs[j], ys[j]
            xs[i] = _pick(a, k) * x + _pick(b, k) * y + _pick(e, k)
            ys[i] = _pick(c, k) * x + _pick(d, k) * y + _pick(f, k)


@njit(inline="always")
def _column(maps: Float32s, column: int) -> tuple[np.float32, np.float32, np.float32, np.float32]:
    return maps[0, column], maps[1, column], maps[2, column], maps[3, column]


@njit(inline="always")
def _pick(column: tuple[np.float32, np.float32, np.float32, np.float32], k: np.uint8) -> np.float32:
    value = column[1] if k == np.uint8(1) else column[0]
    value = column[2] if k == np.uint8(2) else value
    return column[3] if k == np.uint8(3) else value
