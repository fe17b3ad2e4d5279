"""Colours: diamond-square backgrounds, fractals by hit count, and blur (Anderson & Farrell 2022)."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from fractalgen.kernels import CACHE
from fractalgen.kernels.random import Key, hash32
from fractalgen.kernels.raster import Counts, peak_of
from fractalshards.png import Pixels

Heights = npt.NDArray[np.float32]


@dataclass(frozen=True)
class HeightColors:
    """Affine maps from height x to hue, saturation and value, each (scale, shift) in units of 0..255.

    hue = int(scale x + shift) mod 256; saturation and value are truncated and clamped to 0..255.
    """

    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]


BLACK = HeightColors((0.0, 0.0), (0.0, 0.0), (0.0, 0.0))


def diamond_square(size: int, decay: float, key: Key) -> Heights:
    """Compute fractal noise by the diamond-square algorithm (Fournier, Fussell & Carpenter 1982).

    The grid has side 2**k + 1, k = ceil(log2 size), and corners U(0, 1); the displacement at level j = 1..k is U(-m, m)
    with m = 0.5 exp(decay (1 - j)). In the square step, the neighbour missing at a border is the one that lies a step
    inside the opposite border. The displacement of a cell depends on (key, cell) alone, see ``hash32``.

    Returns the top left (size, size) of the grid, float32; size is at least 2.
    """
    levels = (size - 1).bit_length()
    amplitudes = np.array([0.5 * math.exp(decay * (1 - j)) for j in range(1, levels + 1)], np.float32)
    grid = np.empty((2**levels + 1, 2**levels + 1), np.float32)
    _fill_noise(grid.reshape(-1), *key)
    _displace(grid, amplitudes)
    return np.ascontiguousarray(grid[:size, :size])


@njit(cache=CACHE)
def _fill_noise(cells: Heights, key0: np.uint32, key1: np.uint32) -> None:
    """Fill cells with uniform float32 in [-1, 1), of 24 random bits."""
    for i in range(len(cells)):
        bits = hash32(np.uint32(i), key0, key1) >> np.uint32(8)
        cells[i] = np.float32(np.int32(bits)) * np.float32(2.0**-23) - np.float32(1)


@njit(cache=CACHE)
def _displace(grid: Heights, amplitudes: Heights) -> None:
    """Turn noise in [-1, 1) into heights, in place, level by level; a cell holds its noise until its level is due."""
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
    """Displace the centres of squares: every second column, starting at ``step``."""
    quarter = np.float32(0.25)
    for k in range(len(here) // (2 * step)):
        # unsigned, because numba checks signed indices for negative values
        left = np.uint64(2 * step) * np.uint64(k)
        centre, right = left + np.uint64(step), left + np.uint64(2 * step)
        corners = (above[left] + above[right]) + (below[left] + below[right])
        here[centre] = quarter * corners + amplitude * here[centre]


@njit(inline="always")
def _squares(above: Heights, here: Heights, below: Heights, step: int, odd: bool, amplitude: np.float32) -> None:
    """Displace the centres of edges: the odd columns, or the even ones, whose ends lack a neighbour."""
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


@njit(inline="always")
def hsv_pixel(hue: np.float32, saturation: np.float32, value: np.float32) -> tuple[np.float32, np.float32, np.float32]:
    """Convert one pixel: float32 hue, saturation, value in 0..255 to float32 r, g, b in 0..255, not yet rounded."""
    one = np.float32(1)
    sextant = hue * np.float32(6 / 180)
    sextant = sextant - np.float32(6) if sextant >= np.float32(6) else sextant
    sector = np.int32(sextant)
    fraction = sextant - np.float32(sector)
    s = saturation * np.float32(1 / 255)
    v = value * np.float32(1 / 255)
    p = v * (one - s)
    q = v * (one - s * fraction)
    t = v * (one - s * (one - fraction))
    red = v if sector == 0 else q if sector == 1 else p if sector <= 3 else t if sector == 4 else v
    green = t if sector == 0 else v if sector <= 2 else q if sector == 3 else p
    blue = p if sector <= 1 else t if sector == 2 else v if sector <= 4 else q
    scale = np.float32(255)
    return red * scale, green * scale, blue * scale


Float32s = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FractalColors:
    """Colours of a fractal: hue = int(255 count / peak + hue_shift) mod 256, one saturation and value, 0..255."""

    hue_shift: float
    saturation: int
    value: int


def paint(counts: Counts, fractal: FractalColors, heights: Heights, background: HeightColors) -> Pixels:
    """Colour an image, (size, size, 3) uint8 RGB: pixels with hits by their count, all others by their height.

    ``counts`` are (size, size) uint32, ``heights``, of the background, (size, size) float32.
    """
    image = np.empty((*counts.shape, 3), np.uint8)
    maps = np.array([*background.hue, *background.saturation, *background.value], np.float32)
    own = np.array([fractal.hue_shift, fractal.saturation, fractal.value], np.float32)
    _paint(counts, peak_of(counts), own, heights, maps, image)
    return image


def gaussian_blur(image: Pixels, sigma: float) -> Pixels:
    """Blur an image, (H, W, 3) uint8 of at least 2 x 2 pixels, with a 3 x 3 Gaussian of ``sigma`` pixels.

    Uses OpenCV's 8-bit fixed-point arithmetic; the border is reflected without repeating the edge.
    """
    side = np.float32(math.exp(-0.5 / sigma**2))
    weight = round(256 * float(side) / (1 + 2 * float(side)))
    blurred = np.empty_like(image)
    _blur(image, np.uint32(weight), np.uint32(256 - 2 * weight), blurred)
    return blurred


@njit(cache=CACHE)
def _paint(counts: Counts, peak: int, own: Float32s, heights: Heights, maps: Float32s, image: Pixels) -> None:
    """Paint row by row in three loops, each of which vectorises; a single loop would not."""
    width = counts.shape[1]
    hsv = np.empty((3, width), np.uint8)
    rgb = np.empty((3, width), np.uint8)
    for row in range(len(counts)):
        _color_row(counts[row], np.float32(peak), own, heights[row], maps, hsv)
        _convert_row(hsv, rgb)
        for column in range(width):
            image[row, column, 0] = rgb[0, column]
            image[row, column, 1] = rgb[1, column]
            image[row, column, 2] = rgb[2, column]


@njit(inline="always")
def _color_row(counts: Counts, peak: np.float32, own: Float32s, heights: Heights, maps: Float32s, hsv: Pixels) -> None:
    """Compute hue, saturation and value of each pixel in both colourings, and select one without a branch."""
    full = np.float32(255)
    hue, saturation, value = hsv[0], hsv[1], hsv[2]
    own_hue, own_saturation, own_value = own[0], own[1], own[2]
    hue_scale, hue_shift = maps[0], maps[1]
    saturation_scale, saturation_shift = maps[2], maps[3]
    value_scale, value_shift = maps[4], maps[5]
    for i in range(len(counts)):
        hit = counts[i] > np.uint32(0)
        height = heights[i]
        own_turn = np.float32(np.int32(counts[i])) / peak * full + own_hue
        turn = own_turn if hit else height * hue_scale + hue_shift
        hue[i] = np.uint8(np.int32(turn) & np.int32(255))
        level = _clamp(height * saturation_scale + saturation_shift)
        saturation[i] = np.uint8(np.int32(own_saturation if hit else level))
        level = _clamp(height * value_scale + value_shift)
        value[i] = np.uint8(np.int32(own_value if hit else level))


@njit(inline="always")
def _clamp(level: np.float32) -> np.float32:
    """Clamp to 0..255; written out because ``min`` and ``max`` of floats do not vectorise."""
    level = level if level > np.float32(0) else np.float32(0)
    return level if level < np.float32(255) else np.float32(255)


@njit(inline="always")
def _convert_row(hsv: Pixels, rgb: Pixels) -> None:
    """Convert HSV to RGB, truncating like OpenCV's vector code and so like the published generator."""
    hue, saturation, value = hsv[0], hsv[1], hsv[2]
    red, green, blue = rgb[0], rgb[1], rgb[2]
    for i in range(len(hue)):
        r, g, b = hsv_pixel(np.float32(hue[i]), np.float32(saturation[i]), np.float32(value[i]))
        red[i], green[i], blue[i] = np.uint8(np.int32(r)), np.uint8(np.int32(g)), np.uint8(np.int32(b))


@njit(cache=CACHE)
def _blur(image: Pixels, side: np.uint32, centre: np.uint32, blurred: Pixels) -> None:
    """Blur along rows, then along columns, with weights in 1/256, rounding once at the end."""
    height, width, _ = image.shape
    sums = np.empty((height, 3 * width), np.uint32)
    padded = np.empty(3 * width + 6, np.uint8)
    for row in range(height):
        padded[3:-3] = image[row].reshape(-1)
        padded[:3] = image[row, 1]
        padded[-3:] = image[row, width - 2]
        _mix(padded[:-6], padded[3:-3], padded[6:], side, centre, sums[row])  # not shifted indices, which numba checks
    for row in range(height):
        above = sums[row - 1 if row > 0 else 1]
        below = sums[row + 1 if row < height - 1 else height - 2]
        out = blurred[row].reshape(-1)
        here = sums[row]
        for i in range(3 * width):
            total = np.uint32(side * np.uint32(above[i] + below[i])) + np.uint32(centre * here[i])
            out[i] = np.uint8(np.uint32(total + np.uint32(1 << 15)) >> np.uint32(16))


@njit(inline="always")
def _mix(before: Pixels, here: Pixels, after: Pixels, side: np.uint32, centre: np.uint32, sums: Counts) -> None:
    for i in range(len(sums)):
        ends = np.uint32(np.uint32(before[i]) + np.uint32(after[i]))
        sums[i] = np.uint32(side * ends) + np.uint32(centre * np.uint32(here[i]))
