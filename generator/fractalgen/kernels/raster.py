"""Rasteriser: counts of points per pixel of a window, each point drawn as a patch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from fractalgen.kernels import CACHE

Points = npt.NDArray[Any]  # one coordinate of all points, float32 or float64
Counts = npt.NDArray[np.uint32]
Patch = npt.NDArray[np.int64]  # the cells that a point hits
Window = tuple[float, float, float, float]  # xmin, ymin, xmax, ymax
_Pair = tuple[Any, Any]  # of scalars of the type of the points

POINT = np.array([[1, 1]])  # the patch of a single pixel


@dataclass(frozen=True)
class Orientation:
    """The orientation of an image: transposed first, then mirrored top-bottom and left-right."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False


def bounding_box(xs: Points, ys: Points) -> Window:
    """Return the smallest window (xmin, ymin, xmax, ymax) that holds all points; NaN is ignored, infinity is not."""
    low, high = np.fmin.reduce, np.fmax.reduce
    return float(low(xs)), float(low(ys)), float(high(xs)), float(high(ys))


def splat(
    xs: Points, ys: Points, size: int, window: Window, patch: Patch = POINT, orientation: Orientation = Orientation()
) -> Counts:
    """Count how often each pixel is hit when every point draws the patch: (size, size) uint32.

    Row and column are ``int((x - xmin) * scale)`` and ``int((y - ymin) * scale)`` with scale = (size - 1) / extent, or
    size - 1 if the extent is not positive. Cell (i, j) of the 3 x 3 patch is added at (row + i - 1, column + j - 1);
    cells outside the image are dropped, as in the published rasteriser. Points are counted first and the patch is
    applied once to the counts, which gives the same sums.

    Args:
        xs, ys: (n,) float32 or float64, the type of the arithmetic. Non-finite points are dropped.
        size: side length in pixels, at least 1.
        window: (xmin, ymin, xmax, ymax).
        patch: (k, 2) cells, each in 0..2.
        orientation: applied to the image of the points, before the patch.
    """
    xmin, ymin, xmax, ymax = window
    scalar = xs.dtype.type
    x_scale = scalar((size - 1) / (xmax - xmin if xmax > xmin else 1))
    y_scale = scalar((size - 1) / (ymax - ymin if ymax > ymin else 1))
    hits = np.zeros((size + 2) ** 2 + 1, np.uint32)
    corner, scales = (scalar(xmin), scalar(ymin)), (x_scale, y_scale)
    _count(xs, ys, corner, scales, size, _index_map(size, orientation), hits)
    counts = np.zeros((size, size), np.uint32)
    _spread(hits[:-1].reshape(size + 2, size + 2), np.ascontiguousarray(patch), counts)
    return counts


def peak_of(counts: Counts) -> int:
    """Return the divisor that brings counts into [0, 1]: their maximum, or 1 if nothing was hit."""
    return max(int(counts.max()), 1)


def _index_map(size: int, orientation: Orientation) -> tuple[int, int, int]:
    """(start, row step, column step) of a point's cell in the flat (size + 2) x (size + 2) grid of hits."""
    pitch = size + 2  # a margin of one cell keeps the points just outside, whose patches reach into the image
    down = -pitch if orientation.flip_rows else pitch
    right = -1 if orientation.flip_columns else 1
    start = (size if orientation.flip_rows else 1) * pitch + (size if orientation.flip_columns else 1)
    return (start, right, down) if orientation.transpose else (start, down, right)


@njit(cache=CACHE)
def _count(
    xs: Points, ys: Points, corner: _Pair, scales: _Pair, size: int, index_map: tuple[int, int, int], hits: Counts
) -> None:
    """Count the points in each cell of the flat grid; the last element of ``hits`` counts those outside."""
    low = xs.dtype.type(-2)
    high = xs.dtype.type(size + 1)
    outside = np.int32(len(hits) - 1)
    start, row_step, column_step = np.int32(index_map[0]), np.int32(index_map[1]), np.int32(index_map[2])
    cells = np.empty(len(xs), np.int32)
    for i in range(len(xs)):  # vectorises; the loop over counts below cannot
        row = (xs[i] - corner[0]) * scales[0]
        column = (ys[i] - corner[1]) * scales[1]
        inside = (row > low) & (row < high) & (column > low) & (column < high)
        row = row if inside else low  # so that a float is cast to an integer only if it lies in (-2, size + 1)
        column = column if inside else low
        cell = start + np.int32(row) * row_step + np.int32(column) * column_step
        cells[i] = cell if inside else outside
    for i in range(len(xs)):
        hits[cells[i]] += np.uint32(1)


@njit(cache=CACHE)
def _spread(hits: Counts, patch: Patch, counts: Counts) -> None:
    """Add the grid of hits to ``counts`` once per cell of the patch, shifted by it."""
    size = len(counts)
    for row in range(size):
        out = counts[row]
        for k in range(len(patch)):
            right = 2 - patch[k, 1]
            shifted = hits[row + 2 - patch[k, 0], right : right + size]
            for column in range(size):
                out[column] += shifted[column]
