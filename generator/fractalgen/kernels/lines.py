"""Rings of VisualAtom and RCDB: closed curves that noise displaces orbit after orbit, drawn with Pillow's lines.

The noise is that of the PyPI package ``noise`` 1.2.2 in one dimension, and segments are those of ``ImageDraw.line`` of
width 1, both equal to the last bit.
"""

import numpy as np
import numpy.typing as npt
from numba import int64, njit, uint32, uint64

from fractalgen.kernels import CACHE
from fractalgen.kernels.mt19937 import Words, below, fill, skip, spare_bits, unit_float
from fractalgen.kernels.random import Key, hash32

Canvas = npt.NDArray[np.uint8]
Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int32]

NO_KEY = np.uint32(0), np.uint32(0)
NO_BUFFERS = np.empty((0, 0), np.uint32)
_NOISE_RANGE = 10000.0

_PERMUTATION = (
    *(151, 160, 137, 91, 90, 15, 131, 13, 201, 95, 96, 53, 194, 233, 7, 225, 140, 36, 103, 30, 69, 142, 8, 99, 37, 240),
    *(21, 10, 23, 190, 6, 148, 247, 120, 234, 75, 0, 26, 197, 62, 94, 252, 219, 203, 117, 35, 11, 32, 57, 177, 33, 88),
    *(237, 149, 56, 87, 174, 20, 125, 136, 171, 168, 68, 175, 74, 165, 71, 134, 139, 48, 27, 166, 77, 146, 158, 231),
    *(83, 111, 229, 122, 60, 211, 133, 230, 220, 105, 92, 41, 55, 46, 245, 40, 244, 102, 143, 54, 65, 25, 63, 161, 1),
    *(216, 80, 73, 209, 76, 132, 187, 208, 89, 18, 169, 200, 196, 135, 130, 116, 188, 159, 86, 164, 100, 109, 198, 173),
    *(186, 3, 64, 52, 217, 226, 250, 124, 123, 5, 202, 38, 147, 118, 126, 255, 82, 85, 212, 207, 206, 59, 227, 47, 16),
    *(58, 17, 182, 189, 28, 42, 223, 183, 170, 213, 119, 248, 152, 2, 44, 154, 163, 70, 221, 153, 101, 155, 167, 43),
    *(172, 9, 129, 22, 39, 253, 19, 98, 108, 110, 79, 113, 224, 232, 178, 185, 112, 104, 218, 246, 97, 228, 251, 34),
    *(242, 193, 238, 210, 144, 12, 191, 179, 162, 241, 81, 51, 145, 235, 249, 14, 239, 107, 49, 192, 214, 31, 181),
    *(199, 106, 157, 184, 84, 204, 176, 115, 121, 50, 45, 127, 4, 150, 254, 138, 236, 205, 93, 222, 114, 67, 29, 24),
    *(72, 243, 141, 128, 195, 78, 66, 215, 61, 156, 180),
)
# 1 to 8, but -1 wherever bit 3 of the hash is set, as in the package
_GRADIENTS = np.array([-1 if p & 8 else (p & 7) + 1 for p in (*_PERMUTATION, _PERMUTATION[0])], np.float32)


@njit(cache=CACHE)
def draw_ring(
    canvas: Canvas,
    curve: Float64s,
    centre: tuple[float, float],
    waves: Float64s,
    orbits: int,
    greys: int,
    scale: float,
    factor: float,
    offset: float,
    buffers: Words,
    at: int,
    key: Key,
) -> int:
    """Draw the orbits of an instance, later ones over earlier ones; return the number of words drawn.

    An orbit takes a grey level, then noise for all x, then for all y, two words each, and displaces the curve.

    Args:
        canvas: (size, size) uint8, painted over; size at most 4096.
        curve: (2, V) float64, x and y of the vertices before the first orbit; displaced in place.
        centre: x and y added to every vertex when it is drawn; the sums must stay within 2**30.
        waves: (4, V) float64: cosine and sine of the angle of every vertex, and two terms subtracted from its noise.
        orbits: number of orbits.
        greys: number of grey levels to draw from, 256, or 257 of which the last one is drawn as 255.
        scale: factor on the noise, also subtracted from it.
        factor: another factor on the noise.
        offset: subtracted from the displacement.
        buffers: those of ``mt19937``, or ``NO_BUFFERS`` to draw words with ``hash32``.
        at: number of words drawn before.
        key: key for ``hash32``, or ``NO_KEY``.
    """
    vertices = curve.shape[1]
    words = np.empty(4 * vertices, np.uint32)
    noise = np.empty((2, vertices), np.float32)
    corners = np.empty((2, vertices + 1), np.int32)
    spare = spare_bits(greys)
    for _ in range(orbits):
        if len(buffers):
            grey, at = below(buffers, at, greys, spare)
            at = fill(buffers, at, words)
        else:
            grey = uint32(uint64(hash32(uint32(at), key[0], key[1])) * uint64(greys) >> uint64(32))
            _hash(words, uint32(at + 1), key)
            at += 1 + len(words)
        _perlin(words, noise.reshape(-1))
        for axis in range(2):
            _displace(curve[axis], noise[axis], waves[axis], waves[2:], scale, factor, offset)
            _truncate(curve[axis], centre[axis], corners[axis])
        _draw_polygon(canvas, corners[0], corners[1], np.uint8(min(int(grey), 255)))
    return at


@njit(cache=CACHE)
def _hash(words: Words, first: np.uint32, key: Key) -> None:
    for i in range(len(words)):
        words[i] = hash32(uint32(first + uint32(i)), key[0], key[1])


@njit(cache=CACHE)
def _perlin(words: Words, noise: Float32s) -> None:
    """Compute the noise at uniform places of [0, 10000], all in float32."""
    for i in range(len(noise)):
        place = np.float32(_NOISE_RANGE * unit_float(words[2 * i], words[2 * i + 1]))
        floor = np.floor(place)
        cell = np.int32(floor) & 255
        x = place - floor
        fade = x * x * x * (x * (x * np.float32(6) - np.float32(15)) + np.float32(10))
        left = _GRADIENTS[cell] * x
        right = _GRADIENTS[cell + 1] * (x - np.float32(1))
        noise[i] = (left + fade * (right - left)) * np.float32(0.4)


@njit(cache=CACHE)
def _displace(
    curve: Float64s, noise: Float32s, directions: Float64s, waves: Float64s, scale: float, factor: float, offset: float
) -> None:
    """Displace one coordinate of all vertices."""
    first, second = waves[0], waves[1]
    for k in range(len(curve)):
        shift = scale * np.float64(noise[k]) * factor - scale - first[k] - second[k]
        curve[k] -= directions[k] * (shift - offset)


@njit(cache=CACHE)
def _truncate(curve: Float64s, centre: float, corners: Integers) -> None:
    """Truncate one coordinate of all vertices to pixels; the first vertex follows the last one."""
    for k in range(len(curve)):
        corners[k] = np.int32(curve[k] + centre)
    corners[len(curve)] = corners[0]


@njit(cache=CACHE, nogil=True)
def skip_instances(
    buffers: Words, at: int, vertices: int, orbits: int, greys: int, first: int, stop: int, reals: int, ranges: Integers
) -> int:
    """Skip the words of instances ``first`` to ``stop - 1``; return the new ``at``.

    Each draws its orbits; all but instance 0 draw ``reals`` real numbers and an integer below each of ``ranges`` first.
    """
    spare = spare_bits(greys)
    for instance in range(first, stop):
        if instance:
            at = skip(buffers, at, 2 * reals)
            for values in ranges:
                _, at = below(buffers, at, values, spare_bits(values))
        for _ in range(orbits):
            _, at = below(buffers, at, greys, spare)
            at = skip(buffers, at, 4 * vertices)
    return at


_FRACTION = 40  # bits of a slope; enough for the longest line across a canvas of 4096 pixels
_HALF = 1 << (_FRACTION - 1)
_AT_ONCE = 8  # pixels per turn of a loop, the last one repeated: cheaper than a loop that ends at any pixel


_RECIPROCALS = np.concatenate([[0], -(-(1 << _FRACTION) // np.arange(1, 4097))])  # rounded up; of 0 it is 0


@njit(cache=CACHE)
def _draw_polygon(canvas: Canvas, columns: Integers, rows: Integers, grey: np.uint8) -> None:
    """Draw the segments between consecutive vertices as Pillow does: Bresenham, each pixel clipped on its own.

    Pixel j of a segment of n + 1 is j steps along the longer axis and floor(d j / n + 1/2) along the other one, where d
    is its extent there; this is where Bresenham's error changes sign.
    """
    size = len(canvas)
    flat = canvas.reshape(-1)
    for k in range(len(columns) - 1):
        x0, y0, x1, y1 = int64(columns[k]), int64(rows[k]), int64(columns[k + 1]), int64(rows[k + 1])
        if (min(x0, x1) >= size) | (min(y0, y1) >= size) | (max(x0, x1) < 0) | (max(y0, y1) < 0):
            continue
        width, height = abs(x1 - x0), abs(y1 - y0)
        right, down = (1 if x1 >= x0 else -1), (1 if y1 >= y0 else -1)
        steep = height >= width
        length, extent = (height, width) if steep else (width, height)
        if (min(x0, x1) < 0) | (min(y0, y1) < 0) | (max(x0, x1) >= size) | (max(y0, y1) >= size):
            if steep:
                _draw_clipped(canvas.T, y0, x0, length, extent, down, right, grey)
            else:
                _draw_clipped(canvas, x0, y0, length, extent, right, down, grey)
            continue
        along, across = (down * size, right) if steep else (right, down * size)
        slope = extent * _RECIPROCALS[length]
        start = y0 * size + x0
        for first in range(int64(0), length + 1, _AT_ONCE):
            for i in range(_AT_ONCE):
                j = min(first + i, length)
                flat[uint64(start + j * along + ((_HALF + slope * j) >> int64(_FRACTION)) * across)] = grey


@njit(cache=CACHE)
def _draw_clipped(
    canvas: Canvas, x0: int, y0: int, length: int, extent: int, x_step: int, y_step: int, grey: np.uint8
) -> None:
    """Draw the visible pixels of a segment whose longer axis is that of the columns."""
    size = len(canvas)
    first = -x0 if x_step > 0 else x0 - size + 1
    last = size - 1 - x0 if x_step > 0 else x0
    for j in range(max(first, 0), min(last, length) + 1):
        y = y0 + (2 * extent * j + length) // (2 * length) * y_step
        if 0 <= y < size:
            canvas[y, x0 + j * x_step] = grey
