"""Backgrounds: diamond-square noise, and how its heights become colours (Anderson & Farrell 2022)."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from fractalgen.rng import Stream, hash32

Heights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class HeightColors:
    """Affine maps of height x to hue, saturation and value, each (scale, shift) in units of 0..255.

    hue = int(scale x + shift) mod 256; saturation and value are truncated and clamped to 0..255.
    """

    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]


BLACK = HeightColors((0.0, 0.0), (0.0, 0.0), (0.0, 0.0))


def draw_height_colors(rng: Stream) -> HeightColors:
    """Draw the colours of a background, with the published ranges."""
    return HeightColors(
        hue=(255 * rng.uniform(0.25, 1.0), 255 * rng.uniform(0.0, 1.0)),
        saturation=(255 * rng.uniform(0.1, 0.3), 255 * rng.uniform(0.4, 0.6)),
        value=(255 * rng.uniform(0.3, 0.6), 255 * rng.uniform(0.4, 0.6)),
    )


def diamond_square(size: int, decay: float, key: tuple[np.uint32, np.uint32]) -> Heights:
    """Fractal noise by the diamond-square algorithm (Fournier, Fussell & Carpenter 1982).

    On a grid of side 2**k + 1, k = ceil(log2 size), with corners U(0, 1); the displacement at level j = 1..k is
    U(-m, m) with m = 0.5 exp(decay (1 - j)). At the border of the square step the missing neighbour is the one
    that lies a step inside the opposite border.

    Args:
        size: side length in pixels, at least 2.
        decay: how fast detail loses amplitude per level.
        key: of ``rng.hash32``; the displacement of a cell depends on (key, cell) alone.

    Returns:
        The top left (size, size) float32 of the grid.
    """
    levels = (size - 1).bit_length()
    amplitudes = np.array([0.5 * math.exp(decay * (1 - j)) for j in range(1, levels + 1)], np.float32)
    grid = np.empty((2**levels + 1, 2**levels + 1), np.float32)
    _fill(grid, amplitudes, *key)
    return grid[:size, :size]


@njit(inline="always")
def _signed_unit(cell: int, key0: np.uint32, key1: np.uint32) -> np.float32:
    """A uniform float32 in [-1, 1), of 24 random bits."""
    bits = hash32(np.uint32(cell), key0, key1) >> np.uint32(8)
    return np.float32(np.int32(bits)) * np.float32(2.0**-23) - np.float32(1)


@njit(cache=True)
def _fill(grid: Heights, amplitudes: Heights, key0: np.uint32, key1: np.uint32) -> None:
    side = len(grid)
    last = side - 1
    half, quarter = np.float32(0.5), np.float32(0.25)
    for row in (0, last):
        for column in (0, last):
            grid[row, column] = half + half * _signed_unit(row * side + column, key0, key1)
    step = last
    for level in range(len(amplitudes)):
        amplitude = amplitudes[level]
        step //= 2
        for row in range(step, side, 2 * step):
            for column in range(step, side, 2 * step):
                above = grid[row - step, column - step] + grid[row - step, column + step]
                below = grid[row + step, column - step] + grid[row + step, column + step]
                noise = _signed_unit(row * side + column, key0, key1)
                grid[row, column] = quarter * (above + below) + amplitude * noise
        for row in range(0, side, step):
            up = row - step if row > 0 else last - step
            down = row + step if row < last else step
            for column in range(step if (row // step) % 2 == 0 else 0, side, 2 * step):
                left = column - step if column > 0 else last - step
                right = column + step if column < last else step
                around = grid[up, column] + grid[row, left] + grid[row, right] + grid[down, column]
                noise = _signed_unit(row * side + column, key0, key1)
                grid[row, column] = quarter * around + amplitude * noise
