"""Colours, background, paint and blur against OpenCV and against slow renderings by their definitions."""

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
from numba import njit

from fractalgen.kernels.paint import (
    FractalColors,
    HeightColors,
    diamond_square,
    gaussian_blur,
    hsv_pixel,
    paint,
)
from fractalgen.kernels.random import Stream, hash32


def hsv_to_rgb(array: np.ndarray) -> np.ndarray:
    """Convert (..., 3) uint8, rounding as OpenCV's scalar code does and so the published code.

    ``paint`` truncates, as OpenCV's vector code does for whole images; a third of the bytes is one less.
    """
    levels = np.empty((array.size // 3, 3), np.float32)
    _convert(np.ascontiguousarray(array).reshape(-1, 3), levels)
    return np.rint(levels).astype(np.uint8).reshape(array.shape)  # ties to even, as OpenCV's cvRound


@njit
def _convert(hsv, levels):
    for i in range(len(hsv)):
        levels[i] = hsv_pixel(np.float32(hsv[i, 0]), np.float32(hsv[i, 1]), np.float32(hsv[i, 2]))


def test_hsv_equals_the_published_conversion(reference: Path) -> None:
    with np.load(reference / "published_single" / "hsv2rgb.npz") as arrays:
        assert np.array_equal(hsv_to_rgb(arrays["hsv"]), arrays["rgb"])


def test_hsv_equals_opencv_within_one_step() -> None:
    hues, saturations, values = np.meshgrid(np.arange(256), np.arange(0, 256, 5), np.arange(0, 256, 3), indexing="ij")
    hsv = np.stack([hues, saturations, values], -1).astype(np.uint8).reshape(-1, 1, 3)
    theirs = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).astype(int)
    assert np.abs(hsv_to_rgb(hsv).astype(int) - theirs).max() <= 1


def heights_of(size: int, seed: int) -> np.ndarray:
    return diamond_square(size, 0.6, Stream.of("heights", seed).key())


def test_paint_follows_its_definition() -> None:
    rng = np.random.default_rng(0)
    counts = (rng.integers(0, 50, (224, 224)) * rng.integers(0, 2, (224, 224))).astype(np.uint32)
    heights = heights_of(224, 0) * 3 - 1
    fractal = FractalColors(200.7, 180, 220)
    background = HeightColors((240.5, 100.1), (70.2, 120.4), (150.3, 130.6))
    hit = counts > 0
    hue = np.where(
        hit,
        counts.astype(np.float32) / np.float32(counts.max()) * np.float32(255) + np.float32(200.7),
        heights * np.float32(240.5) + np.float32(100.1),
    )
    saturation = np.where(hit, 180, np.clip(heights * np.float32(70.2) + np.float32(120.4), 0, 255))
    value = np.where(hit, 220, np.clip(heights * np.float32(150.3) + np.float32(130.6), 0, 255))
    hsv = np.stack([np.trunc(hue).astype(int) & 255, np.trunc(saturation), np.trunc(value)], -1)
    assert np.any(hue > 256)
    assert np.any(hue < 0)
    painted = paint(counts, fractal, heights, background).astype(int)
    differences = painted - cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)
    assert np.abs(differences).max() <= 1
    assert np.mean(differences != 0) < 2e-4  # where OpenCV's compiler fused a multiplication and an addition
    truncated = hsv_to_rgb(hsv.astype(np.uint8)) - painted
    assert set(np.unique(truncated)) == {0, 1}


@pytest.mark.parametrize("shape", [(2, 2), (3, 5), (31, 30), (224, 224)])
@pytest.mark.parametrize("sigma", [0.5, 0.61, 0.77, 0.9, 1.0])
def test_gaussian_blur_equals_opencv(shape: tuple[int, int], sigma: float) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert np.array_equal(gaussian_blur(image, sigma), cv2.GaussianBlur(image, (3, 3), sigma))


def plain_diamond_square(levels: int, decay: float, noise: np.ndarray) -> np.ndarray:
    """Run the published algorithm in float64, on given noise in [-1, 1)."""
    side = 2**levels + 1
    grid = np.zeros((side, side))
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        grid[corner] = 0.5 + 0.5 * noise[corner]
    for level in range(1, levels + 1):
        amplitude, step = 0.5 * math.exp(decay * (1 - level)), 2 ** (levels - level)
        odd, every = range(step, side, 2 * step), range(0, side, step)
        for r in odd:
            for c in odd:
                corners = [grid[r + i * step, c + j * step] for i in (-1, 1) for j in (-1, 1)]
                grid[r, c] = sum(corners) / 4 + amplitude * noise[r, c]
        for r in every:
            for c in every:
                if (r // step + c // step) % 2 == 1:
                    around = [
                        grid[
                            (r + i * step) if 0 <= r + i * step < side else (side - 1 - step if r == 0 else step),
                            (c + j * step) if 0 <= c + j * step < side else (side - 1 - step if c == 0 else step),
                        ]
                        for i, j in ((-1, 0), (1, 0), (0, -1), (0, 1))
                    ]
                    grid[r, c] = sum(around) / 4 + amplitude * noise[r, c]
    return grid


@pytest.mark.parametrize("size", [16, 17, 33])
def test_diamond_square_is_the_published_algorithm(size: int) -> None:
    levels = math.ceil(math.log2(size))
    key = Stream.of("ds", size).key()
    heights = diamond_square(size, 0.6, key)
    assert heights.shape == (size, size)
    noise = cell_noise(levels, key)
    np.testing.assert_allclose(heights, plain_diamond_square(levels, 0.6, noise)[:size, :size], atol=1e-6)


def cell_noise(levels: int, key: tuple[np.uint32, np.uint32]) -> np.ndarray:
    """Compute the noise of every cell by its definition: hash32 of the cell's number in the grid."""
    side = 2**levels + 1
    words = np.empty(side * side, np.uint32)

    @njit
    def fill(words, key0, key1):
        for i in range(len(words)):
            words[i] = hash32(np.uint32(i), key0, key1)

    fill(words, *key)
    return ((words >> 8) * 2.0**-23 - 1).reshape(side, side)
