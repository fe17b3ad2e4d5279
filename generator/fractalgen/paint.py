"""Paints an image in one pass: the fractal where it was hit, the background elsewhere; and blurs it."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from fractalgen.background import HeightColors, Heights
from fractalgen.color import Pixels, hsv_pixel, to_byte
from fractalgen.raster import Counts

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
    planes = np.empty((3, counts.shape[1]), np.uint8)
    maps = np.array([*background.hue, *background.saturation, *background.value], np.float32)
    own = np.array([fractal.hue_shift, fractal.saturation, fractal.value], np.float32)
    _paint(counts, max(int(counts.max()), 1), own, heights, maps, planes, image)
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
def _paint(
    counts: Counts, peak: int, own: Floats, heights: Heights, maps: Floats, planes: Pixels, image: Pixels
) -> None:
    """Row by row: a loop over planes that vectorises, then one that interleaves them."""
    zero, full = np.float32(0), np.float32(255)
    divisor = np.float32(peak)
    for row in range(len(counts)):
        for column in range(counts.shape[1]):
            count = counts[row, column]
            height = heights[row, column]
            hit = count > 0
            turn = np.float32(np.int32(count)) / divisor * full + own[0] if hit else height * maps[0] + maps[1]
            saturation = own[1] if hit else min(max(height * maps[2] + maps[3], zero), full)
            value = own[2] if hit else min(max(height * maps[4] + maps[5], zero), full)
            red, green, blue = hsv_pixel(
                np.float32(np.int32(turn) & 255), np.float32(np.int32(saturation)), np.float32(np.int32(value))
            )
            planes[0, column] = to_byte(red)
            planes[1, column] = to_byte(green)
            planes[2, column] = to_byte(blue)
        for column in range(counts.shape[1]):
            image[row, column, 0] = planes[0, column]
            image[row, column, 1] = planes[1, column]
            image[row, column, 2] = planes[2, column]


@njit(cache=True)
def _blur(image: Pixels, side: np.uint32, centre: np.uint32, blurred: Pixels) -> None:
    """Separable: sums of weights in 1/256 along rows, then along columns, rounded once at the end."""
    height, width, _ = image.shape
    last = 3 * (width - 1)
    sums = np.empty((height, 3 * width), np.uint32)
    for row in range(height):
        flat = image[row].reshape(-1)
        for i in range(3, last):
            sums[row, i] = side * (np.uint32(flat[i - 3]) + np.uint32(flat[i + 3])) + centre * np.uint32(flat[i])
        for i in range(3):
            sums[row, i] = np.uint32(2) * side * np.uint32(flat[i + 3]) + centre * np.uint32(flat[i])
            j = last + i
            sums[row, j] = np.uint32(2) * side * np.uint32(flat[j - 3]) + centre * np.uint32(flat[j])
    for row in range(height):
        up = sums[row - 1 if row > 0 else 1]
        down = sums[row + 1 if row < height - 1 else height - 2]
        here = sums[row]
        out = blurred[row].reshape(-1)
        for i in range(3 * width):
            total = side * (up[i] + down[i]) + centre * here[i]
            out[i] = np.uint8((total + np.uint32(1 << 15)) >> np.uint32(16))
