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
    _fill_noise(grid.reshape(-1), *key)
    _displace(grid, amplitudes)
    return np.ascontiguousarray(grid[:size, :size])


@njit(cache=True)
def _fill_noise(cells: Heights, key0: np.uint32, key1: np.uint32) -> None:
    """cells[i] = a uniform float32 in [-1, 1), of 24 random bits."""
    for i in range(len(cells)):
        bits = hash32(np.uint32(i), key0, key1) >> np.uint32(8)
        cells[i] = np.float32(np.int32(bits)) * np.float32(2.0**-23) - np.float32(1)


@njit(cache=True)
def _displace(grid: Heights, amplitudes: Heights) -> None:
    """Turn noise in [-1, 1) into heights, in place and level by level; a cell holds its noise until its level comes."""
    last = len(grid) - 1
    half = np.float32(0.5)
    for row in (0, last):
        for column in (0, last):
            grid[row, column] = half + half * grid[row, column]
    step = last
    for level in range(len(amplitudes)):
        step //= 2
        for row in range(step, last, 2 * step):
            _diamonds(grid[row - step], grid[row], grid[row + step], step, amplitudes[level])
        for row in range(0, last + 1, step):
            above = grid[row - step if row > 0 else last - step]
            below = grid[row + step if row < last else step]
            _squares(above, grid[row], below, step, (row // step) % 2 == 0, amplitudes[level])


@njit(inline="always")
def _diamonds(above: Heights, here: Heights, below: Heights, step: int, amplitude: np.float32) -> None:
    """The centres of squares: every second column from the first."""
    quarter = np.float32(0.25)
    for k in range(len(here) // (2 * step)):
        # unsigned, for numba checks signed indices for being negative, in every loop of a kernel
        left = np.uint64(2 * step) * np.uint64(k)
        centre, right = left + np.uint64(step), left + np.uint64(2 * step)
        corners = (above[left] + above[right]) + (below[left] + below[right])
        here[centre] = quarter * corners + amplitude * here[centre]


@njit(inline="always")
def _squares(above: Heights, here: Heights, below: Heights, step: int, odd: bool, amplitude: np.float32) -> None:
    """The centres of edges: every second column, the odd ones or the even ones, whose ends have a neighbour missing."""
    quarter = np.float32(0.25)
    last = len(here) - 1
    if not odd:
        for end in (0, last):
            around = above[end] + here[last - step] + here[step] + below[end]
            here[end] = quarter * around + amplitude * here[end]
    first = step if odd else 2 * step
    for k in range((last - first + step) // (2 * step)):
        column = np.uint64(first) + np.uint64(2 * step) * np.uint64(k)
        left, right = column - np.uint64(step), column + np.uint64(step)
        around = above[column] + here[left] + here[right] + below[column]
        here[column] = quarter * around + amplitude * here[column]
