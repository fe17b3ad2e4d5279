import numpy as np
import pytest
import torch
import xxhash

from fractaltrain.recipes import FT_RECIPES, PT_RECIPES
from fractaltrain.recipes.recipe import change
from fractaltrain.transforms import evaluation_geometry, to_input, training_geometry

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8)
SQUARE = IMAGE[:24]
CPU = torch.device("cpu")


@pytest.mark.parametrize("recipe", [PT_RECIPES["anderson"], FT_RECIPES["anderson"]])
@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("crop", ["none", "random", "resized"])
def test_any_image_becomes_a_square_of_the_asked_size(recipe, size, crop):
    recipe = change(recipe, {"crop": crop})
    for transform in (training_geometry(recipe, size, CPU), evaluation_geometry(recipe, size)):
        image = transform(IMAGE, 7)
        assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)


def test_pretraining_and_evaluation_leave_images_of_the_right_size_as_they_are():
    assert np.array_equal(training_geometry(PT_RECIPES["anderson"], 24, CPU)(SQUARE, 0), SQUARE)
    assert np.array_equal(evaluation_geometry(PT_RECIPES["anderson"], 24)(SQUARE, 0), SQUARE)


def test_finetuning_is_augmented_as_ever():
    """The bits of the published fine-tuning augmentation, as they were before there was any other."""
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    seen = np.stack([training_geometry(FT_RECIPES["anderson"], 32, CPU)(image, key) for key in range(20)])
    assert xxhash.xxh3_64_hexdigest(seen.tobytes()) == "74ed2d6d7c1c31d5"


def test_flip_alone():
    flips = training_geometry(change(FT_RECIPES["anderson"], {"augment": "none"}), 24, CPU)
    seen = [flips(SQUARE, key) for key in range(200)]
    flipped = sum(np.array_equal(image, SQUARE[:, ::-1]) for image in seen)
    assert flipped + sum(np.array_equal(image, SQUARE) for image in seen) == 200
    assert 70 < flipped < 130


def test_finetuning_shifts_along_y_only_and_zooms_in():
    """Published: translate (0, 1/8), zoom 1 to 1.2."""
    transform = training_geometry(change(FT_RECIPES["anderson"], {"hflip": "0"}), 64, CPU)
    dot = np.zeros((64, 64, 3), np.uint8)
    dot[30:34, 30:34] = 255
    centres = []
    for key in range(100):
        y, x = np.argwhere(transform(dot, key)[..., 0] > 127).mean(0).tolist()
        centres.append((abs(y - 31.5), abs(x - 31.5)))
    assert max(x for _, x in centres) < 1.5  # rotation about the centre does not move it
    assert 8 < max(y for y, _ in centres) < 11.5  # an eighth of the padded 80 pixels is 10


def test_numbers_the_model_sees():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert to_input(images, PT_RECIPES["anderson"]).flatten().tolist() == pytest.approx([0, 0.2, 1])
    assert to_input(images, FT_RECIPES["anderson"]).flatten().tolist() == pytest.approx([-1, -0.6, 1])
    odd = change(PT_RECIPES["anderson"], {"mean": "0.1,0.2,0.3", "std": "1,2,0.5"})
    assert to_input(images, odd).flatten().tolist() == pytest.approx([-0.1, 0, 1.4])
