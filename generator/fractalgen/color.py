"""Colour: HSV to RGB as OpenCV does it for 8 bits, and the pixels of indexed images."""

import numpy as np
import numpy.typing as npt
from numba import njit, uint64

from fractalshards.png import Indexed

Pixels = npt.NDArray[np.uint8]


def pixels_of(image: Pixels | Indexed) -> Pixels:
    """The pixels (H, W, 3) uint8 of a rendered image; those of two colours ten times as fast as ``Indexed.rgb``."""
    if not isinstance(image, Indexed):
        return image
    if len(image.palette) != 2:
        return image.rgb()
    first, second = image.palette
    pixels = np.empty((*image.indices.shape, 3), np.uint8)
    _expand(np.ascontiguousarray(image.indices).reshape(-1), first, second, pixels.reshape(-1))
    return pixels


@njit(inline="always")
def hsv_pixel(hue: np.float32, saturation: np.float32, value: np.float32) -> tuple[np.float32, np.float32, np.float32]:
    """One pixel: float32 hue, saturation, value in 0..255 to float32 r, g, b in 0..255, not yet rounded."""
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


@njit(cache=True)
def _expand(indices: Pixels, first: Pixels, second: Pixels, pixels: Pixels) -> None:
    """Pixels of two colours: the first and, times the index, their difference modulo 256, which needs no look-up."""
    red, green, blue = first[0], first[1], first[2]
    more_red, more_green, more_blue = second[0] - red, second[1] - green, second[2] - blue
    for i in range(len(indices)):
        at = uint64(3) * uint64(i)
        pixels[at] = np.uint8(red + indices[i] * more_red)
        pixels[at + uint64(1)] = np.uint8(green + indices[i] * more_green)
        pixels[at + uint64(2)] = np.uint8(blue + indices[i] * more_blue)
