"""Resizing as OpenCV's ``INTER_LINEAR`` does it for 8 bits, and pasting objects onto a canvas."""

import numpy as np
import numpy.typing as npt
from numba import njit

from fractalgen.kernels import CACHE
from fractalshards.png import Pixels

Integers = npt.NDArray[np.int32]

_ONE = 2048  # weights have 11 fractional bits


def resize(image: Pixels, size: int) -> Pixels:
    """Resize a square image (s, s, 3) uint8 to (size, size, 3): bilinear, without antialiasing, in fixed point.

    Pixel centres are aligned: output i lies at (i + 0.5) s / size - 0.5 of the input, with the border repeated. Equals
    OpenCV's result byte for byte.
    """
    place = ((np.arange(size) + 0.5) * (len(image) / size) - 0.5).astype(np.float32)
    first = np.floor(place)
    near, far = (np.clip(first + step, 0, len(image) - 1).astype(np.int32) for step in (0, 1))
    weight = np.rint((place - first) * np.float32(_ONE)).astype(np.int32)  # of ``far``
    resized = np.empty((size, size, 3), np.uint8)
    _resize(image, near, far, weight, resized)
    return resized


@njit(cache=CACHE)
def _resize(image: Pixels, near: Integers, far: Integers, weight: Integers, resized: Pixels) -> None:
    """Mix every input row along x, then pairs of rows along y, with OpenCV's two roundings."""
    size = len(near)
    mixed = np.empty((len(image), 3 * size), np.int32)
    for row in range(len(image)):
        for column in range(size):
            left, right, share = near[column], far[column], weight[column]
            for channel in range(3):
                value = image[row, left, channel] * (_ONE - share) + image[row, right, channel] * share
                mixed[row, 3 * column + channel] = value
    for row in range(size):
        above, below = mixed[near[row]], mixed[far[row]]
        share = weight[row]
        rest = np.int32(_ONE - share)
        out = resized[row].reshape(-1)
        for i in range(3 * size):
            upper = np.int32(rest * np.int32(above[i] >> np.int32(4))) >> np.int32(16)
            lower = np.int32(share * np.int32(below[i] >> np.int32(4))) >> np.int32(16)
            out[i] = np.uint8((upper + lower + np.int32(2)) >> np.int32(2))


Box = tuple[int, int, int, int]  # x, y, width, height in pixels


class Canvas:
    """An image (size, size, 3) uint8, and for every pixel the number, up to 255, of its object; 0 for none."""

    def __init__(self, background: Pixels) -> None:
        """Make a canvas without objects; the background (size, size, 3) uint8 is painted over."""
        self.image, self.owner, self.pasted = background, np.zeros(background.shape[:2], np.uint8), 0

    def paste(self, pixels: Pixels, x: int, y: int) -> None:
        """Paste an object (s, s, 3) uint8, clipped, with its top left at column x, row y; black is transparent."""
        self.pasted += 1
        _paste(self.image, self.owner, pixels, x, y, np.uint8(self.pasted))

    def visible_boxes(self) -> list[Box | None]:
        """Return the bounding box of the visible pixels of every object, in order of pasting; None if hidden."""
        low = np.full((self.pasted + 1, 2), len(self.owner), np.int64)
        high = np.full((self.pasted + 1, 2), -1, np.int64)
        _find_boxes(self.owner, low, high)
        corners = zip(low[1:].tolist(), high[1:].tolist(), strict=True)
        return [(x, y, right - x + 1, down - y + 1) if right >= 0 else None for (x, y), (right, down) in corners]


@njit(cache=CACHE)
def _paste(image: Pixels, owner: npt.NDArray[np.uint8], pixels: Pixels, x: int, y: int, number: np.uint8) -> None:
    height, width, _ = image.shape
    for row in range(max(0, -y), min(len(pixels), height - y)):
        for column in range(max(0, -x), min(pixels.shape[1], width - x)):
            red, green, blue = pixels[row, column, 0], pixels[row, column, 1], pixels[row, column, 2]
            if red | green | blue:
                image[y + row, x + column, 0] = red
                image[y + row, x + column, 1] = green
                image[y + row, x + column, 2] = blue
                owner[y + row, x + column] = number


@njit(cache=CACHE)
def _find_boxes(owner: npt.NDArray[np.uint8], low: npt.NDArray[np.int64], high: npt.NDArray[np.int64]) -> None:
    for row in range(len(owner)):
        for column in range(owner.shape[1]):
            number = owner[row, column]
            if number == 0:
                continue
            low[number, 0] = min(low[number, 0], column)
            low[number, 1] = min(low[number, 1], row)
            high[number, 0] = max(high[number, 0], column)
            high[number, 1] = max(high[number, 1], row)
