"""What a model sees of held-out images that are no squares."""

from dataclasses import replace

import numpy as np
import pytest

from fractaltrain.recipes import PT_RECIPES
from fractaltrain.transforms import evaluation_geometry

RESIZED = PT_RECIPES["deit"]


def disc(height: int, width: int, radius: float) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    inside = (y - (height - 1) / 2) ** 2 + (x - (width - 1) / 2) ** 2 <= radius**2
    return np.repeat(np.where(inside, 255, 0).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize(("height", "width"), [(160, 320), (320, 160), (160, 160), (161, 1000), (20, 32)])
def test_resized_pieces_in_training_mean_the_middle_in_its_shape(height, width):
    """A disc stays one: its width and height are what the scale of the shorter side makes of them."""
    short = min(height, width)
    seen = evaluation_geometry(RESIZED, 56)(disc(height, width, short / 4), 0)
    assert seen.shape == (56, 56, 3)
    inside = seen[..., 0] > 127
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    for line in (rows, columns):
        assert np.ptp(line) + 1 == pytest.approx(64 / 2, abs=2)  # half of 8/7 of 56
        assert line.mean() == pytest.approx(27.5, abs=1)


def test_what_training_sees_whole_is_seen_whole():
    seen = evaluation_geometry(replace(RESIZED, crop="none"), 56)(disc(112, 112, 200), 0)
    assert seen.min() == 255
