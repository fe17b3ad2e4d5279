"""Paints an image in one pass: the fractal where it was hit, the background elsewhere; and blurs it."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from fractalgen.background import HeightColors, Heights
from fractalgen.color import Pixels, hsv_pixel
from fractalgen.raster import Counts, peak_of

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FractalColors:
    """Colours of a fractal: hue = int(255 count / peak + hue_shift) mod 256, one saturation and value, 0..255."""

    hue_shift: float
    saturation: int
    value: int


def paint(counts: Counts, fractal: FractalColors, heights: Heights, background: HeightColors) -> Pixels:
    """Colour an image: pixels with hits by their count, all others by the height of the background.

    Args:
        counts: (size, size) uint32 hits per pixel.
        heights: (size, size) float32.

    Returns:
        (size, size, 3) uint8 RGB.
    """
    image = np.empty((*counts.shape, 3), np.uint8)
    maps = np.array([*background.hue, *background.saturation, *background.value], np.float32)
    own = np.array([fractal.hue_shift, fractal.saturation, fractal.value], np.float32)
    _paint(counts, peak_of(counts), own, heights, maps, image)
    return image


def gaussian_blur(image: Pixels, sigma: float) -> Pixels:
    """Blur with a 3 x 3 Gaussian in OpenCV's 8-bit fixed-point arithmetic, the border reflected without its edge.

    Args:
        image: (H, W, 3) uint8, at least 2 x 2.
        sigma: in pixels, positive.
    """
    side = np.float32(math.exp(-0.5 / sigma**2))
    weight = round(256 * float(side) / (1 + 2 * float(side)))
    blurred = np.empty_like(image)
    _blur(image, np.uint32(weight), np.uint32(256 - 2 * weight), blurred)
    return blurred


@njit(cache=True)
def _paint(counts: Counts, peak: int, own: Floats, heights: Heights, maps: Floats, image: Pixels) -> None:
    """Row by row in three loops that each vectorise, as one loop of all would not."""
    width = counts.shape[1]
    hsv = np.empty((3, width), np.uint8)
    rgb = np.empty((3, width), np.uint8)
    for row in range(len(counts)):
        _color_row(counts[row], np.float32(peak), own, heights[row], maps, hsv[0], hsv[1], hsv[2])
        _convert_row(hsv[0], hsv[1], hsv[2], rgb[0], rgb[1], rgb[2])
        for column in range(width):
            image[row, column, 0] = rgb[0, column]
            image[row, column, 1] = rgb[1, column]
            image[row, column, 2] = rgb[2, column]


@njit(inline="always")
def _color_row(
    counts: npt.NDArray[np.uint32],
    peak: np.float32,
    own: Floats,
    heights: Floats,
    maps: Floats,
    hue: Pixels,
    saturation: Pixels,
    value: Pixels,
) -> None:
    """Hue, saturation and value of each pixel: both colourings are computed, and one is taken, without a branch."""
    full = np.float32(255)
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
    """To 0..255; written out because ``min`` and ``max`` of floats do not vectorise."""
    level = level if level > np.float32(0) else np.float32(0)
    return level if level < np.float32(255) else np.float32(255)


@njit(inline="always")
def _convert_row(hue: Pixels, saturation: Pixels, value: Pixels, red: Pixels, green: Pixels, blue: Pixels) -> None:
    """HSV to RGB, truncated as OpenCV's vector code does, so that images are those of the published generator."""
    for i in range(len(hue)):
        r, g, b = hsv_pixel(np.float32(hue[i]), np.float32(saturation[i]), np.float32(value[i]))
        red[i], green[i], blue[i] = np.uint8(np.int32(r)), np.uint8(np.int32(g)), np.uint8(np.int32(b))


@njit(cache=True)
def _blur(image: Pixels, side: np.uint32, centre: np.uint32, blurred: Pixels) -> None:
    """Separable: sums of weights in 1/256 along rows, then along columns, rounded once at the end.

    Shifted views instead of shifted indices, which numba would have to check for being negative.
    """
    height, width, _ = image.shape
    sums = np.empty((height, 3 * width), np.uint32)
    padded = np.empty(3 * width + 6, np.uint8)
    for row in range(height):
        padded[3:-3] = image[row].reshape(-1)
        padded[:3] = image[row, 1]
        padded[-3:] = image[row, width - 2]
        _mix(padded[:-6], padded[3:-3], padded[6:], side, centre, sums[row])
    for row in range(height):
        above = sums[row - 1 if row > 0 else 1]
        below = sums[row + 1 if row < height - 1 else height - 2]
        out = blurred[row].reshape(-1)
        here = sums[row]
        for i in range(3 * width):
            total = np.uint32(side * np.uint32(above[i] + below[i])) + np.uint32(centre * here[i])
            out[i] = np.uint8(np.uint32(total + np.uint32(1 << 15)) >> np.uint32(16))


@njit(inline="always")
def _mix(
    before: Pixels, here: Pixels, after: Pixels, side: np.uint32, centre: np.uint32, sums: npt.NDArray[np.uint32]
) -> None:
    for i in range(len(sums)):
        ends = np.uint32(np.uint32(before[i]) + np.uint32(after[i]))
        sums[i] = np.uint32(side * ends) + np.uint32(centre * np.uint32(here[i]))
