"""Resizing and pasting: byte for byte as OpenCV resizes, and nothing drawn outside."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractalgen.kernels.compose import Canvas, resize


def picture(side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("source", [1, 2, 8, 111, 112, 256])
def test_every_size_is_that_of_opencv(source: int) -> None:
    image = picture(source)
    for size in [*range(1, 140), 224, 300]:
        assert np.array_equal(resize(image, size), cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR))


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(-35, 35), st.integers(-35, 35)), max_size=6))
def test_what_is_visible_of_each_object_is_boxed(pastes: list[tuple[int, int, int]]) -> None:
    canvas = Canvas.of(np.full((20, 20, 3), 200, np.uint8))
    expected = np.full((20, 20, 3), 200, np.uint8)
    owner = np.zeros((20, 20), int)
    for number, (side, x, y) in enumerate(pastes, 1):
        pixels = picture(side, number)
        pixels[picture(side, number + 99)[..., 0] < 128] = 0
        canvas.paste(pixels, x, y)
        for row, column in np.argwhere(pixels.any(-1)).tolist():
            if 0 <= y + row < 20 and 0 <= x + column < 20:
                expected[y + row, x + column] = pixels[row, column]
                owner[y + row, x + column] = number
    assert np.array_equal(canvas.image, expected)
    for number, box in enumerate(canvas.visible_boxes(), 1):
        rows, columns = np.nonzero(owner == number)
        if box is None:
            assert len(rows) == 0
        else:
            x, y, width, height = box
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())
