"""Resizing as OpenCV's ``INTER_LINEAR`` does it for 8 bits: bilinear, without antialiasing, in fixed point."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from fractalgen.color import Pixels

Integers = npt.NDArray[np.int32]

_ONE = 2048  # weights have 11 fractional bits


def resize(image: Pixels, size: int) -> Pixels:
    """Resize a square image (s, s, 3) uint8 to (size, size, 3).

    Pixel centres are aligned: output i lies at (i + 0.5) s / size - 0.5 of the input, and beyond the border the last
    pixel goes on. Equal to OpenCV's result byte for byte.

    Args:
        size: side length in pixels, at least 1.
    """
    taps = _taps(len(image), size)
    resized = np.empty((size, size, 3), np.uint8)
    _resize(image, taps.near, taps.far, taps.weight, resized)
    return resized


@dataclass(frozen=True)
class _Taps:
    """For every output pixel the two input pixels it lies between, and the weight of the second, 0..2048."""

    near: Integers
    far: Integers
    weight: Integers


def _taps(source: int, target: int) -> _Taps:
    place = ((np.arange(target) + 0.5) * (source / target) - 0.5).astype(np.float32)
    first = np.floor(place)
    near, far = (np.clip(first + step, 0, source - 1).astype(np.int32) for step in (0, 1))
    return _Taps(near, far, np.rint((place - first) * np.float32(_ONE)).astype(np.int32))


@njit(cache=True)
def _resize(image: Pixels, near: Integers, far: Integers, weight: Integers, resized: Pixels) -> None:
    """Every input row is mixed along x, then pairs of them along y, with OpenCV's two roundings."""
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
