"""HSV to RGB with the generator's own arithmetic, rounded as OpenCV's scalar code and so the published code does."""

import numpy as np
from numba import njit

from fractalgen.kernels.paint import hsv_pixel


def hsv_to_rgb(array: np.ndarray) -> np.ndarray:
    """Convert (..., 3) uint8 of hue in units of 2 degrees, saturation and value to uint8; ``paint`` truncates instead.

    OpenCV's vector code, which converts whole images, truncates too, and so gives a third of the bytes one less.
    """
    levels = np.empty((array.size // 3, 3), np.float32)
    _convert(np.ascontiguousarray(array).reshape(-1, 3), levels)
    return np.rint(levels).astype(np.uint8).reshape(array.shape)  # ties to even, as OpenCV's cvRound


@njit
def _convert(hsv, levels):
    for i in range(len(hsv)):
        levels[i] = hsv_pixel(np.float32(hsv[i, 0]), np.float32(hsv[i, 1]), np.float32(hsv[i, 2]))
