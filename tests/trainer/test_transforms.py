"""Transforms: random numbers come from keys alone, distributions are as published; libraries test their own pixels."""

import pickle
import random

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from fractaltrain.recipes import FT_RECIPES, PT_RECIPES
from fractaltrain.recipes.recipe import TrainRecipe, change
from fractaltrain.stream.loader import Batch
from fractaltrain.transforms import train_batch, train_transform, val_transform

CPU = torch.device("cpu")
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8)
SQUARE = IMAGE[:24]


def recipe(**fields: object) -> TrainRecipe:
    return change(PT_RECIPES["anderson"], {name: str(value) for name, value in fields.items()})


RECIPES = {
    "plain": recipe(),
    "random": recipe(crop="random"),
    "resized": recipe(crop="resized", hflip=0.5),
    "affine": FT_RECIPES["anderson"],
    "jitter": recipe(color_jitter=0.3),
    "deit": PT_RECIPES["deit"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_transforms_depend_on_the_key_alone(name):
    """Not on the state of a global generator, which they leave as it was, nor on earlier calls; also when pickled."""
    transform = train_transform(RECIPES[name], 16)
    expected = [transform(IMAGE, key).tobytes() for key in range(30)]
    assert len(set(expected)) == 1 if name == "plain" else len(set(expected)) > 15
    generators = (random.random, np.random.rand, lambda: float(torch.rand(())))
    states = []
    for again in (transform, pickle.loads(pickle.dumps(transform))):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        assert [again(IMAGE, key).tobytes() for key in reversed(range(30))] == expected[::-1]
        states.append([draw() for draw in generators])
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert states == [[draw() for draw in generators]] * 2


@pytest.mark.parametrize("shape", [(40, 24), (1, 1), (5, 500), (900, 1)])
@pytest.mark.parametrize("name", RECIPES)
def test_transforms_make_a_square_of_any_image(name, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for size in (16, 32):
        for transform in (train_transform(RECIPES[name], size), val_transform(RECIPES[name], size)):
            seen = transform(image, 7)
            assert (seen.shape, seen.dtype) == ((size, size, 3), np.uint8)


def test_affine_augmentation_never_changes():
    """The pixels of the published augmentation for fine-tuning, as the first version had them."""
    image = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    seen = np.stack([train_transform(FT_RECIPES["anderson"], 32)(image, key) for key in range(20)])
    assert xxhash.xxh3_64_hexdigest(seen.tobytes()) == "74ed2d6d7c1c31d5"


def test_flips_are_independent_and_have_their_probabilities():
    transform = train_transform(recipe(hflip=0.5, vflip=0.25), 24)
    flips = [SQUARE, SQUARE[:, ::-1], SQUARE[::-1], SQUARE[::-1, ::-1]]
    seen = [transform(SQUARE, key) for key in range(800)]
    counts = [sum(np.array_equal(image, flip) for image in seen) for flip in flips]
    assert sum(counts) == 800
    assert counts == pytest.approx([300, 300, 100, 100], abs=50)
    affine = train_transform(recipe(augment="affine", vflip=1.0), 24)
    upright = train_transform(recipe(augment="affine"), 24)
    assert np.mean(affine(SQUARE, 1) != upright(SQUARE, 1)) > 0.2


def test_random_crops_come_from_everywhere():
    marked = np.zeros((40, 30, 3), np.uint8)
    marked[..., 0], marked[..., 1] = np.mgrid[:40, :30]
    transform, places = train_transform(recipe(crop="random"), 24), np.zeros((17, 7), int)
    for key in range(3000):
        piece = transform(marked, key)
        top, left = piece[0, 0, :2]
        assert np.array_equal(piece, marked[top : top + 24, left : left + 24])
        places[top, left] += 1
    assert places.min() > 5  # the mean is 25


def test_resized_crops_have_torchvisions_distribution():
    """The values at the borders of a cropped ramp give the box of the crop."""
    ramp = np.zeros((128, 128, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.mgrid[:128, :128]
    transform = train_transform(recipe(crop="resized"), 128)
    seen = [transform(ramp, key) for key in range(1500)]
    top, bottom, left, right = np.array(
        [(image[0, 64, 0], image[-1, 64, 0], image[64, 0, 1], image[64, -1, 1]) for image in seen]
    ).T.astype(int)
    height, width = bottom - top + 1, right - left + 1
    torch.manual_seed(0)
    picture = torch.empty(3, 128, 128)
    boxes = [RandomResizedCrop.get_params(picture, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(4000)]
    their_top, their_left, their_height, their_width = np.array(boxes).T
    shares = np.linspace(0.05, 0.95, 7)
    for ours, theirs, spread in (
        (height * width / 128**2, their_height * their_width / 128**2, 0.06),
        (width / height, their_width / their_height, 0.06),
        (top, their_top, 5),
        (left, their_left, 5),
    ):
        assert np.allclose(np.quantile(ours, shares), np.quantile(theirs, shares), atol=spread)


@pytest.mark.parametrize("magnitude", [0.5, 9.0, 10.0])
def test_randaugment_takes_any_magnitude(monkeypatch, magnitude):
    drawn = []
    monkeypatch.setattr(random, "gauss", lambda mean, deviation: drawn.append((mean, deviation)) or mean)
    transform = train_transform(recipe(randaugment=magnitude), 24)
    for key in range(100):
        transform(SQUARE, key)
    assert set(drawn) == {(magnitude, 0.5)}


def test_color_jitter_stays_within_its_strength():
    grey = np.full((4, 4, 3), 100, np.uint8)
    transform = train_transform(recipe(color_jitter=0.3), 4)
    seen = np.stack([transform(grey, key) for key in range(64)])
    assert 69 <= seen.min() < seen.max() <= 130
    assert len(np.unique(seen[:, 0, 0, 0])) > 30


@pytest.mark.parametrize(("height", "width"), [(112, 112), (84, 150), (150, 84)])
def test_val_transform_keeps_shapes(height, width):
    """A disc stays a disc in the centre, at 8/7 of the scale of the shorter side."""
    y, x = np.mgrid[:height, :width]
    radius = min(height, width) / 4
    disc = 255 * ((y - (height - 1) / 2) ** 2 + (x - (width - 1) / 2) ** 2 < radius**2)
    seen = val_transform(recipe(crop="resized"), 56)(np.repeat(disc[..., None].astype(np.uint8), 3, axis=2), 0)
    inside = seen[..., 0] > 127
    for line in (np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))):
        assert np.ptp(line) + 1 == pytest.approx(64 / 2, abs=2)
        assert line.mean() == pytest.approx(27.5, abs=1)


def test_val_transform_takes_the_centre_or_resizes_as_pillow_does():
    assert np.array_equal(val_transform(recipe(crop="random"), 20)(IMAGE, 0), IMAGE[10:30, 2:22])
    want = Image.fromarray(IMAGE).resize((30, 30), Image.Resampling.BILINEAR)
    assert np.array_equal(val_transform(recipe(), 30)(IMAGE, 0), np.asarray(want))
    bicubic = np.asarray(Image.fromarray(SQUARE[:20, :20]).resize((30, 30), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(val_transform(recipe(crop="random"), 30)(SQUARE[:20, :20], 0) - bicubic).max() <= 2


def batch(images: torch.Tensor, labels: torch.Tensor, key: int = 0) -> Batch:
    return Batch(images, labels, (), np.arange(key, key + len(images), dtype=np.uint64), ())


def test_batch_without_mixing_is_normalized_and_its_labels_smoothed():
    images, labels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1), torch.tensor([2])
    seen, targets = train_batch(batch(images, labels), recipe(mean="0.1,0.2,0.5", std="1,0.5,0.25"), 5, CPU)
    assert torch.allclose(seen.flatten(), torch.tensor([-0.1, 0.0, 2.0]))
    assert torch.equal(targets, labels)
    _, smoothed = train_batch(batch(images, labels), recipe(label_smoothing=0.1), 5, CPU)
    assert torch.allclose(smoothed, torch.tensor([[0.02, 0.02, 0.92, 0.02, 0.02]]))


def test_erasing_fills_parts_of_images_with_noise():
    images = torch.full((400, 3, 40, 32), 255, dtype=torch.uint8)
    erased, _ = train_batch(batch(images, torch.zeros(400, dtype=torch.int64)), recipe(erasing=0.25), 1, CPU)
    inside = (erased != 1).any(1, keepdim=True)
    assert float(inside.flatten(1).any(1).float().mean()) == pytest.approx(0.25, abs=0.07)
    noise = erased[inside.expand_as(erased)]
    assert (float(noise.mean()), float(noise.std())) == pytest.approx((0, 1), abs=0.05)


def test_mixing_makes_soft_targets_of_pairs():
    chosen, seen = recipe(mixup=0.8, cutmix=1.0, label_smoothing=0.1), set()
    pure = (torch.arange(8, dtype=torch.uint8) * 10).view(8, 1, 1, 1).expand(8, 3, 16, 16)
    for key in range(40):
        images, targets = train_batch(batch(pure, torch.arange(8), key), chosen, 10, CPU)
        assert (targets.shape, targets.dtype) == ((8, 10), torch.float32)
        assert torch.allclose(targets.sum(1), torch.ones(8))
        share = float((targets[0, 0] - 0.01) / 0.9)  # of the first image in itself
        assert float(images[0].mean()) == pytest.approx(70 / 255 * (1 - share), abs=0.002)
        seen.add("mixup" if len(images[0].unique()) == 1 else "cutmix")
    assert seen == {"mixup", "cutmix"}


def test_mixed_multi_label_images_show_the_classes_of_both():
    shown = torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    pure = (torch.arange(4, dtype=torch.uint8) * 10).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    images, targets = train_batch(batch(pure, shown), recipe(mixup=0.8, label_smoothing=0.1), 3, CPU)
    share = 1 - float(images[0].mean()) * 255 / 30
    assert 0 < share < 1
    assert torch.allclose(targets[0], share * shown[0] + (1 - share) * shown[3], atol=1e-5)
    assert torch.allclose(targets[1], share * shown[1] + (1 - share) * shown[2], atol=1e-5)
