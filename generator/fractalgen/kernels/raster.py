"""Points to counts: a histogram over the pixels of a window, splatted once with a patch."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Counts = npt.NDArray[np.uint32]
Window = tuple[float, float, float, float]  # xmin, ymin, xmax, ymax

POINT = np.array([[1, 1]])  # the patch of a single pixel


@dataclass(frozen=True)
class Orientation:
    """How the image lies: transposed first, then mirrored top-bottom and left-right."""

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False


def bounding_box(xs: npt.NDArray[Any], ys: npt.NDArray[Any]) -> Window:
    """The smallest window (xmin, ymin, xmax, ymax) that holds all points; NaN is passed over, infinity is not."""
    low, high = np.fmin.reduce, np.fmax.reduce
    return float(low(xs)), float(low(ys)), float(high(xs)), float(high(ys))


def splat(
    xs: npt.NDArray[Any],
    ys: npt.NDArray[Any],
    size: int,
    window: Window,
    patch: npt.NDArray[np.int64] = POINT,
    orientation: Orientation = Orientation(),
) -> Counts:
    """How often each pixel is hit when every point draws the patch: (size, size) uint32.

    Row and column are ``int((x - xmin) * scale)`` and ``int((y - ymin) * scale)`` with scale = (size - 1) / extent,
    an extent that is not positive counting as 1; cell (i, j) of the 3 x 3 patch is added at (row + i - 1,
    column + j - 1), and what falls outside is dropped (so the published rasteriser). Points are counted first and
    the patch applied once to the counts, which gives the same sums.

    Args:
        xs: (n,) float32 or float64; the arithmetic is done in that type. Non-finite points are dropped.
        ys: likewise.
        size: side length in pixels, at least 1.
        patch: (k, 2) cells, each in 0..2.
        orientation: applied to the image of the points; the patch is laid on after that.
    """
    xmin, ymin, xmax, ymax = window
    kind = xs.dtype.type
    x_scale = kind((size - 1) / (xmax - xmin if xmax > xmin else 1))
    y_scale = kind((size - 1) / (ymax - ymin if ymax > ymin else 1))
    hits = np.zeros((size + 2) ** 2 + 1, np.uint32)
    _count(xs, ys, kind(xmin), kind(ymin), x_scale, y_scale, size, *_index_map(size, orientation), hits)
    counts = np.zeros((size, size), np.uint32)
    _spread(hits[:-1].reshape(size + 2, size + 2), np.ascontiguousarray(patch), counts)
    return counts


def peak_of(counts: Counts) -> int:
    """What counts are divided by to lie in [0, 1]: their maximum, or 1 where nothing was hit."""
    return max(int(counts.max()), 1)


def _index_map(size: int, orientation: Orientation) -> tuple[int, int, int]:
    """(start, row step, column step) of a point's cell in the flat (size + 2) x (size + 2) grid of hits.

    The margin of one cell keeps the points just outside, whose patch reaches in.
    """
    pitch = size + 2
    down = -pitch if orientation.flip_rows else pitch
    right = -1 if orientation.flip_columns else 1
    start = (size if orientation.flip_rows else 1) * pitch + (size if orientation.flip_columns else 1)
    return (start, right, down) if orientation.transpose else (start, down, right)


@njit(cache=True)
def _count(
    xs: npt.NDArray[Any],
    ys: npt.NDArray[Any],
    xmin: Any,
    ymin: Any,
    x_scale: Any,
    y_scale: Any,
    size: int,
    start: Any,
    row_step: Any,
    column_step: Any,
    hits: Counts,
) -> None:
    """Count the points in each cell of the flat grid; the last element of ``hits`` takes those outside.

    The cells are computed in a first loop that vectorises, the counts are raised in a second that cannot. A float
    is cast only where it is known to lie in (-2, size + 1).
    """
    low = xs.dtype.type(-2)
    high = xs.dtype.type(size + 1)
    outside = np.int32(len(hits) - 1)
    start, row_step, column_step = np.int32(start), np.int32(row_step), np.int32(column_step)
    cells = np.empty(len(xs), np.int32)
    for i in range(len(xs)):
        row = (xs[i] - xmin) * x_scale
        column = (ys[i] - ymin) * y_scale
        inside = (row > low) & (row < high) & (column > low) & (column < high)
        row = row if inside else low
        column = column if inside else low
        cell = start + np.int32(row) * row_step + np.int32(column) * column_step
        cells[i] = cell if inside else outside
    for i in range(len(xs)):
        hits[cells[i]] += np.uint32(1)


@njit(cache=True)
def _spread(hits: Counts, patch: npt.NDArray[np.int64], counts: Counts) -> None:
    """Add the grid of hits to ``counts`` once for each cell of the patch, shifted by it."""
    size = len(counts)
    for row in range(size):
        out = counts[row]
        for k in range(len(patch)):
            right = 2 - patch[k, 1]
            shifted = hits[row + 2 - patch[k, 0], right : right + size]
            for column in range(size):
                out[column] += shifted[column]
