import numpy as np
import pytest
import torch

from fractaltrain.inputs import evaluation_geometry, to_input, training_geometry
from fractaltrain.recipes import FINETUNING, PRETRAINING
from fractaltrain.recipes.recipe import change

IMAGE = np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8)
SQUARE = IMAGE[:24]
AS_TENSOR = torch.from_numpy(SQUARE).permute(2, 0, 1)


@pytest.mark.parametrize("recipe", [PRETRAINING["anderson"], FINETUNING["anderson"]])
@pytest.mark.parametrize("size", [16, 32])
def test_any_image_becomes_a_square_of_the_asked_size(recipe, size):
    for transform in (training_geometry(recipe, size), evaluation_geometry(size)):
        image = transform(IMAGE)
        assert (image.shape, image.dtype) == ((3, size, size), torch.uint8)


def test_pretraining_and_evaluation_leave_images_of_the_right_size_as_they_are():
    assert torch.equal(training_geometry(PRETRAINING["anderson"], 24)(SQUARE), AS_TENSOR)
    assert torch.equal(evaluation_geometry(24)(SQUARE), AS_TENSOR)


def test_flip_alone():
    flips = training_geometry(change(FINETUNING["anderson"], {"augment": "none"}), 24)
    torch.manual_seed(0)
    seen = [flips(SQUARE) for _ in range(200)]
    flipped = sum(torch.equal(image, AS_TENSOR.flip(2)) for image in seen)
    assert flipped + sum(torch.equal(image, AS_TENSOR) for image in seen) == 200
    assert 70 < flipped < 130


def test_finetuning_shifts_along_y_only_and_zooms_in():
    """Published: translate (0, 1/8), zoom 1 to 1.2."""
    transform = training_geometry(change(FINETUNING["anderson"], {"hflip": "0"}), 64)
    dot = np.zeros((64, 64, 3), np.uint8)
    dot[30:34, 30:34] = 255
    torch.manual_seed(0)
    centres = []
    for _ in range(100):
        y, x = torch.nonzero(transform(dot)[0] > 127).double().mean(0).tolist()
        centres.append((abs(y - 31.5), abs(x - 31.5)))
    assert max(x for _, x in centres) < 1.5  # rotation about the centre does not move it
    assert 8 < max(y for y, _ in centres) < 11.5  # an eighth of the padded 80 pixels is 10


def test_numbers_the_model_sees():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    assert to_input(images, PRETRAINING["anderson"]).flatten().tolist() == pytest.approx([0, 0.2, 1])
    assert to_input(images, FINETUNING["anderson"]).flatten().tolist() == pytest.approx([-1, -0.6, 1])
    odd = change(PRETRAINING["anderson"], {"mean": "0.1,0.2,0.3", "std": "1,2,0.5"})
    assert to_input(images, odd).flatten().tolist() == pytest.approx([-0.1, 0, 1.4])
