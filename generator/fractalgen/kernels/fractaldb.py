"""A fast FractalDB renderer (Kataoka et al., ACCV 2020), equal to the published one in every pixel.

A category is a float64 array (maps, 7) of 1 to 255 maps, one row per map: a, b, c, d, e, f and the probability p, with
x' = a x + b y + e and y' = c x + d y + f.
"""

import colorsys
import math
import random
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from numba import njit, uint8, uint16, uint32, uint64

from fractalgen.kernels import CACHE, MAX_MAPS, MAX_POINTS, SIZES
from fractalgen.kernels.random import Key, hash32
from fractalshards.errors import UsageError

Float64s = npt.NDArray[np.float64]
Indices = npt.NDArray[np.uint8]
Masks = npt.NDArray[np.uint16]
Cells = npt.NDArray[np.uint32]
_Box = tuple[float, float, float, float]  # left, bottom, width, height

Draw = Literal["point-gray", "patch-gray", "point-color", "patch-color"]

DRAWS: tuple[Draw, ...] = get_args(Draw)

_PAD = 6
_COLORS = 128
_CHUNK = 1 << 22  # points whose number and mask fit into 32 bits; a multiple of the number of colours
_NUMBERS_SEED = 100  # the same for every image
_BEFORE_NAN = 100  # points before the first NaN that are dropped with it

_LANES = 8  # segments of an orbit that are computed side by side
_WARM_UP = 256  # steps by which a segment starts early, to reach the orbit before it begins


def weight_rows(step: float = 0.4) -> Float64s:
    """Return the multipliers of a..f that turn a category into its 25 variants, as (25, 6) float64.

    Each coefficient in turn is multiplied by 1 - 2s, 1 - s, 1 + s and 1 + 2s; row 2 is all ones.
    """
    factors = [round(1 + k * step, 12) for k in (-2, -1, 1, 2)]  # the decimal numbers of the published file
    rows = np.ones((24, 6))
    for column in range(6):
        rows[4 * column : 4 * column + 4, column] = factors
    return np.insert(rows, 2, 1.0, axis=0)


def is_patch(draw: Draw) -> bool:
    """Return whether points are drawn as patches of 3 x 3 pixels, which need masks."""
    return draw.startswith("patch")


def palette(draw: Draw) -> Indices:
    """Return the colours of the indices of an image, (2 or 129, 3) uint8 RGB: black, then grey or a circle of hues."""
    if not draw.endswith("color"):
        return np.array([(0, 0, 0), (127, 127, 127)], np.uint8)
    circle = [colorsys.hsv_to_rgb(k / _COLORS, 0.75, 0.75)[::-1] for k in range(_COLORS)]  # published as BGR
    return (255 * np.array([(0.0, 0.0, 0.0), *circle])).astype(np.uint8)


@lru_cache(maxsize=1)
def random_numbers(points: int) -> Float64s:
    """Return the numbers that choose the maps of every image, (points,) float64 in [0, 1), read-only.

    Raises UsageError if there are no points, or too many.
    """
    if not 1 <= points <= MAX_POINTS:
        raise UsageError(f"points is {points}: an orbit has 1 to {MAX_POINTS:,} points")
    numbers: Float64s = np.random.RandomState(_NUMBERS_SEED).random_sample(points)
    numbers.flags.writeable = False
    return numbers


def masks(key: Key, count: int) -> Masks:
    """Draw ``count`` patch masks, (count,) uint16, uniform in 1..511; mask i depends on (key, i) alone."""
    drawn = np.empty(count, np.uint16)
    _draw_masks(*key, drawn)
    return drawn


def published_masks(seed: int, count: int) -> Masks:
    """Return the patch masks that the published code draws after ``random.seed(seed)``: (count,) uint16 in 1..511."""
    rng = random.Random(seed)
    return np.array([rng.randrange(1, 512) for _ in range(count)], np.uint16)


def render(
    category: Float64s, weights: Float64s, size: int, points: int, draw: Draw, patch_masks: Masks | None = None
) -> Indices:
    """Draw a category; equal to the published image with flip 0.

    If the orbit diverges, the points up to 100 before the first NaN are drawn; if none are left, the image is black.
    Raises UsageError if an argument is out of its range, or patches have no masks.

    Args:
        category: (maps, 7) float64, any values.
        weights: (6,) float64, a row of ``weight_rows``.
        size: side length in pixels, in ``SIZES``.
        points: 1..``MAX_POINTS``.
        draw: one of ``DRAWS``. A point sets a pixel; a patch sets 3 x 3 pixels, black where its mask has no bit.
        patch_masks: (points,) uint16 in 1..511, for patches: bit 8 is the top left and bit 0 the bottom right pixel,
            before the image is turned upside down.

    Returns:
        (size, size) uint8: 0 where nothing was drawn, else an index into ``palette(draw)``.
    """
    if draw not in DRAWS:
        raise UsageError(f"draw is {draw!r}: expected {' or '.join(DRAWS)}")
    if size not in SIZES:
        raise UsageError(f"size is {size}: an image has {SIZES.start} to {SIZES.stop - 1} pixels a side")
    if is_patch(draw) and (patch_masks is None or len(patch_masks) < points):
        raise UsageError(f"{draw} needs masks for {points} points")
    with np.errstate(all="ignore"):
        xs, ys = orbit(np.hstack([category[:, :6] * weights, category[:, 6:]]), random_numbers(points))
    period = np.uint32(_COLORS - 1 if draw.endswith("color") else 0)
    image = np.zeros((size, size), np.uint8)
    if patch_masks is not None and is_patch(draw):
        _draw_patches(xs, ys, patch_masks, period, image)
    else:
        _draw_points(_cells(xs, ys, size, size), period, image.reshape(-1))
    return flip(image, 1)


def flip(image: Indices, number: int) -> Indices:
    """Return a flipped view of an image, sharing its memory: 0 as it is, 1 top-bottom, 2 left-right, 3 both."""
    rows, columns = (-1 if number & 1 else 1), (-1 if number & 2 else 1)
    return image[::rows, ::columns]


def fill_rate(category: Float64s, numbers: Float64s, size: int) -> float:
    """Return the share of pixels of a (size, size) image that the points of a category hit."""
    image = np.zeros(size * size, np.uint8)
    with np.errstate(all="ignore"):
        _draw_points(_cells(*orbit(category, numbers), size, size), np.uint32(0), image)
    return int(np.count_nonzero(image.view(np.bool_))) / (size * size)


def orbit(category: Float64s, numbers: Float64s) -> tuple[Float64s, Float64s]:
    """Compute the points of a category: the origin, then a step for every number, in [0, 1), but the last.

    Step i applies the first map whose cumulative probability is at least number i, or none if there is no such map.
    Points with a NaN coordinate are dropped, with the 100 points before the first of them, first for x, then for y.
    Returns x and y, float64, possibly infinite. Raises UsageError if there are no maps, too many, or no points.
    """
    points = len(numbers)
    if not (1 <= len(category) <= MAX_MAPS and points):
        raise UsageError(f"{len(category)} maps and {points} points: expected 1 to {MAX_MAPS} maps and some points")
    choices = np.empty(points, np.uint8)
    _choose_maps(np.cumsum(category[:, 6]), numbers, choices)
    xs, ys = np.empty(points), np.empty(points)
    _iterate(category[:, :6].reshape(-1), choices, xs, ys)
    kept = _before_nan(ys[: _before_nan(xs)])
    return xs[:kept], ys[:kept]


def _before_nan(values: Float64s) -> int:
    """Return how many values to keep; an orbit that is NaN stays NaN."""
    if len(values) == 0 or not math.isnan(values[-1]):
        return len(values)
    return max(0, int(np.isnan(values).argmax()) - _BEFORE_NAN)


def _cells(xs: Float64s, ys: Float64s, size: int, pitch: int) -> Cells:
    """Return ``row * pitch + column`` of each point's pixel; see ``_rescale``."""
    cells = np.empty(len(xs), np.uint32)
    if len(xs):
        left, bottom = float(xs.min()), float(ys.min())
        box = left, bottom, float(xs.max()) - left, float(ys.max()) - bottom
        _rescale(xs, ys, box, size, pitch, cells)
    return cells


def _draw_patches(xs: Float64s, ys: Float64s, patch_masks: Masks, period: np.uint32, image: Indices) -> None:
    """Paste the patch of each point; its top left pixel is one below and one right of the point."""
    size = len(image)
    pitch = size + 2  # a margin of three cells above and left: pixel (row, column) is reached from row - 3..row - 1
    cells = _cells(xs, ys, size, pitch)
    for first in range(0, len(cells), _CHUNK):
        chunk = slice(first, first + _CHUNK)
        last = np.zeros(pitch * pitch, np.uint32)
        _mark_last(cells[chunk], patch_masks[chunk], last[3 * pitch + 3 :])
        _paste_last(last.reshape(pitch, pitch), period, image)


@njit(cache=CACHE)
def _draw_masks(key0: np.uint32, key1: np.uint32, drawn: Masks) -> None:
    for i in range(len(drawn)):
        drawn[i] = uint16(1) + uint16((uint64(hash32(uint32(i), key0, key1)) * uint64(511)) >> uint64(32))


@njit(cache=CACHE)
def _choose_maps(cumulative: Float64s, numbers: Float64s, choices: npt.NDArray[np.uint8]) -> None:
    """choices[i] = the first map with numbers[i] <= cumulative, else the number of maps."""
    choices[:] = len(cumulative)
    for k in range(len(cumulative) - 1, -1, -1):  # one pass per map vectorises; a pass with an inner loop would not
        threshold = cumulative[k]
        for i in range(len(choices)):
            choices[i] = uint8(k) if numbers[i] <= threshold else choices[i]


@njit(inline="always")
def _step(maps: Float64s, choice: np.uint8, x: float, y: float) -> tuple[float, float]:
    """Apply a map to a point, or none if there is no map of that number. Unsigned indices save the test for < 0."""
    k = uint64(6) * uint64(choice)
    if k >= uint64(len(maps)):
        return x, y
    return (
        x * maps[k] + y * maps[k + uint64(1)] + maps[k + uint64(4)],
        x * maps[k + uint64(2)] + y * maps[k + uint64(3)] + maps[k + uint64(5)],
    )


@njit(cache=CACHE)
def _iterate(maps: Float64s, choices: npt.NDArray[np.uint8], xs: Float64s, ys: Float64s) -> None:
    """Compute one orbit from the origin, exactly, but not one step after the other.

    Every step waits for the one before, so the orbit is cut into segments that are computed side by side from guessed
    starts: maps that contract on average soon bring any two orbits to the same bits. Then the segments are joined:
    where the true orbit differs from the guess, it is continued until it meets the guessed one.
    """
    points = len(xs)
    length = max(points // _LANES, 1)
    guessed = length * _LANES if length > _WARM_UP else 0
    if guessed:
        _guess(maps, choices, length, xs, ys)
    xs[guessed:] = np.nan  # equal to nothing, so that points without a guess are computed
    xs[0], ys[0] = 0.0, 0.0
    i = 1
    while i < points:
        x, y = _step(maps, choices[i - 1], xs[i - 1], ys[i - 1])
        if x == xs[i] and y == ys[i]:
            i = (i // length + 1) * length
        elif x != x and y != y:  # NaN for good
            xs[i:], ys[i:] = np.nan, np.nan
            return
        else:
            xs[i], ys[i] = x, y
            i += 1


@njit(cache=CACHE)
def _guess(maps: Float64s, choices: npt.NDArray[np.uint8], length: int, xs: Float64s, ys: Float64s) -> None:
    """Compute segments side by side, all from the origin, all but the first starting some steps early."""
    for lane in range(_LANES):
        xs[lane * length], ys[lane * length] = 0.0, 0.0
    for t in range(length - _WARM_UP, length):
        for lane in range(1, _LANES):
            start = uint64(lane) * uint64(length)
            choice = choices[start - uint64(length) + uint64(t)]
            xs[start], ys[start] = _step(maps, choice, xs[start], ys[start])
    for t in range(1, length):
        for lane in range(_LANES):
            i = uint64(lane) * uint64(length) + uint64(t)
            before = i - uint64(1)
            xs[i], ys[i] = _step(maps, choices[before], xs[before], ys[before])


@njit(cache=CACHE, error_model="numpy")  # 0 / 0 is NaN, not an exception
def _rescale(xs: Float64s, ys: Float64s, box: _Box, size: int, pitch: int, cells: Cells) -> None:
    """cells[i] = row * pitch + column of the pixel of point i, where coordinates that are not finite become 0."""
    left, bottom, width, height = box
    pad, limit = float(_PAD), float(size)
    span = float(size - 2 * _PAD)
    for i in range(len(xs)):
        # published: subtract the lowest coordinate if it is negative; the origin is a point, so it is never positive
        column = (xs[i] - left) / width * span + pad
        row = (ys[i] - bottom) / height * span + pad
        column = column if column < limit else 0.0  # a quotient is in [0, 1] or NaN, so only NaN fails the tests
        row = row if row < limit else 0.0
        cells[i] = uint32(np.int32(row) * np.int32(pitch) + np.int32(column))


@njit(cache=CACHE)
def _draw_points(cells: Cells, period: np.uint32, image: Indices) -> None:
    """Set the pixel of each point to 1 + (its number & period)."""
    for i in range(len(cells)):
        image[cells[i]] = uint8(uint32(1) + uint32(uint32(i) & period))


@njit(cache=CACHE)
def _mark_last(cells: Cells, patch_masks: Masks, last: Cells) -> None:
    """Store in each cell its last point, which covers all others: the number, from 1, above the mask in nine bits."""
    for i in range(len(cells)):
        last[cells[i]] = uint32(uint32(i + 1) << uint32(9)) | uint32(patch_masks[i] & uint16(511))


@njit(cache=CACHE)
def _paste_last(last: Cells, period: np.uint32, image: Indices) -> None:
    """Set each pixel by the last point of the nine cells whose patches reach it; without one, leave it as it is.

    This is a maximum of (number, bit of the mask at this pixel), which vectorises; writing nine pixels per point takes
    three times as long.
    """
    size = len(image)
    one, numbers = uint32(1), uint32(0xFFFFFFFE)
    for row in range(size):
        above, beside, below = last[row + 2], last[row + 1], last[row]  # reach it with rows 0, 1 and 2 of the patch
        for column in range(size):
            best = uint32(0)
            for k in range(3):
                word = above[column + 2 - k]
                best = max(best, uint32(word >> uint32(8) & numbers) | uint32(word >> uint32(8 - k) & one))
                word = beside[column + 2 - k]
                best = max(best, uint32(word >> uint32(8) & numbers) | uint32(word >> uint32(5 - k) & one))
                word = below[column + 2 - k]
                best = max(best, uint32(word >> uint32(8) & numbers) | uint32(word >> uint32(2 - k) & one))
            color = uint32(best & one) * uint32(one + uint32(uint32(uint32(best >> one) - one) & period))
            image[row, column] = uint8(color) if best > uint32(0) else image[row, column]
