"""Augmentation: every operation against Pillow's, every draw by its key alone, and figures as published."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_operations
from timm.data.mixup import mixup_target
from torchvision.transforms import RandomResizedCrop

from fractaltrain import transforms as operations
from fractaltrain.recipes import PT_RECIPES
from fractaltrain.recipes.recipe import TrainRecipe, change
from fractaltrain.transforms import (
    color_jitter,
    erase,
    erased_boxes,
    mixed,
    randaugment,
    random_crop,
    random_resized_crop,
    resize,
    resized_crop_box,
    smoothed,
    timm_randaugment,
)

FILL = (10, 128, 200)
KEYS = np.arange(64, dtype=np.uint64)


def smooth(size: int = 48, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def noise(height: int = 48, width: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def as_batch(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def as_images(batch: torch.Tensor) -> np.ndarray:
    return batch.permute(0, 2, 3, 1).numpy()


def recipe(**changes: object) -> TrainRecipe:
    return change(PT_RECIPES["anderson"], {name: str(value) for name, value in changes.items()})


POINTWISE = {
    "brightness": (operations.brightness, timm_operations.brightness, [0.1, 0.5, 1, 1.5, 1.9]),
    "color": (operations.color, timm_operations.color, [0.1, 0.5, 1, 1.5, 1.9]),
    "contrast": (operations.contrast, timm_operations.contrast, [0.1, 0.5, 1, 1.5, 1.9]),
    "sharpness": (operations.sharpness, timm_operations.sharpness, [0.1, 0.5, 1, 1.5, 1.9]),
    "invert": (operations.invert, lambda image, _: timm_operations.invert(image), [0]),
    "posterize": (operations.posterize, lambda image, bits: timm_operations.posterize(image, int(bits)), [1, 3, 8]),
    "solarize": (operations.solarize, timm_operations.solarize, [0, 26, 128, 256]),
    "solarize_add": (
        operations.solarize_add,
        lambda image, add: timm_operations.solarize_add(image, int(add)),
        [0, 99],
    ),
    "auto_contrast": (operations.auto_contrast, lambda image, _: timm_operations.auto_contrast(image), [0]),
    "equalize": (operations.equalize, lambda image, _: timm_operations.equalize(image), [0]),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_pixels_are_pillows(name):
    ours, pillows, levels = POINTWISE[name]
    for image in (smooth(), noise(), np.full((48, 48, 3), 77, np.uint8)):
        got = as_images(ours(as_batch([image] * len(levels)), torch.tensor(levels, dtype=torch.float32)))
        for level, changed in zip(levels, got, strict=True):
            assert np.array_equal(changed, np.asarray(pillows(Image.fromarray(image), level))), level


MOVING = {
    "rotate": (operations.rotate(FILL), timm_operations.rotate, [-30, 7, 30]),
    "shear_x": (operations.shear(0, FILL), timm_operations.shear_x, [-0.3, 0.2]),
    "shear_y": (operations.shear(1, FILL), timm_operations.shear_y, [-0.3, 0.2]),
    "translate_x": (operations.translate(0, FILL), timm_operations.translate_x_rel, [-0.45, 0.2]),
    "translate_y": (operations.translate(1, FILL), timm_operations.translate_y_rel, [-0.45, 0.2]),
}


@pytest.mark.parametrize("name", MOVING)
def test_pixels_move_as_pillows_do(name):
    """Interpolated by another kernel; outside and inside are told apart at the very same pixels."""
    ours, pillows, levels = MOVING[name]
    for image, most in ((smooth(), 4), (np.full((48, 48, 3), 77, np.uint8), 0)):
        got = as_images(ours(as_batch([image] * len(levels)), torch.tensor(levels, dtype=torch.float32)))
        for level, moved in zip(levels, got, strict=True):
            figures = {"resample": Image.Resampling.BICUBIC, "fillcolor": FILL}
            want = np.asarray(pillows(Image.fromarray(image), level, **figures))
            assert np.abs(moved.astype(int) - want).max() <= most, level


def test_randaugment_of_a_batch_draws_as_timm_does():
    """Distances to the original have the same distribution: over operations, levels and how often there is none."""
    images = [smooth(32, seed) for seed in range(400)]
    keys = np.arange(400, dtype=np.uint64)
    reference = timm_randaugment(32, 9, FILL)
    theirs = np.stack([reference(image, key) for key, image in enumerate(images)]).astype(int)
    ours = as_images(randaugment(as_batch(images), keys, 9, FILL)).astype(int)
    distances = [np.abs(changed - np.stack(images)).mean((1, 2, 3)) for changed in (theirs, ours)]
    untouched = [(distance < 0.5).mean() for distance in distances]
    assert untouched == pytest.approx([0.27, 0.27], abs=0.07)  # a quarter has no operation, few do next to nothing
    quantiles = [np.quantile(distance, [0.4, 0.6, 0.8, 0.95]) for distance in distances]
    assert np.allclose(*quantiles, rtol=0.25)


@pytest.mark.parametrize(
    "augment",
    [
        lambda images, keys: randaugment(images, keys, 9, FILL),
        lambda images, keys: color_jitter(images, keys, 0.3),
    ],
)
def test_batches_are_augmented_by_the_keys_of_their_samples_alone(augment):
    images = as_batch([smooth(24, seed) for seed in range(16)])
    before = images.clone()
    torch.manual_seed(1)
    together = augment(images, KEYS[:16])
    torch.manual_seed(2)
    apart = torch.cat([augment(images[some], KEYS[:16][some]) for some in (slice(0, 5), slice(5, 16))])
    assert torch.equal(together, apart)
    assert torch.equal(images, before)
    assert not torch.equal(together, augment(images, KEYS[16:32]))


@pytest.mark.parametrize("magnitude", [0.5, 9.0, 9.5])
def test_timms_randaugment_takes_any_magnitude_of_a_recipe(monkeypatch, magnitude):
    drawn = []
    monkeypatch.setattr(random, "gauss", lambda mean, deviation: drawn.append((mean, deviation)) or mean)
    augment = timm_randaugment(16, magnitude, FILL)
    for key in range(20):
        augment(smooth(16), key)
    assert set(drawn) == {(magnitude, 0.5)}


def test_timms_randaugment_goes_by_the_key_and_leaves_global_generators_alone():
    augment = timm_randaugment(32, 9, FILL)
    random.seed(0)
    np.random.seed(0)
    expected = random.random(), np.random.rand()
    random.seed(0)
    np.random.seed(0)
    seen = [augment(smooth(32), key) for key in (*range(30), *range(30))]
    assert (random.random(), np.random.rand()) == expected
    assert np.array_equal(seen[:30], seen[30:])
    assert len({image.tobytes() for image in seen}) > 15


def test_the_strongest_randaugment_is_no_error(monkeypatch):
    """At magnitude 10 timm would ask Pillow to keep no bits."""
    augment = timm_randaugment(16, 10, FILL)
    for key in range(200):
        augment(smooth(16), key)
    bits = []
    monkeypatch.setattr(operations, "posterize", lambda images, levels: bits.extend(levels.tolist()) or images)
    randaugment(as_batch([smooth(16)] * 64), KEYS, 10, FILL)
    assert bits
    assert min(bits) == 1


def test_color_jitter_stays_within_its_strength():
    grey = torch.full((64, 3, 4, 4), 100, dtype=torch.uint8)
    changed = color_jitter(grey, KEYS, 0.3)
    assert changed.min() >= 69
    assert changed.max() <= 130
    assert len(changed[:, 0, 0, 0].unique()) > 30


def test_random_crops_are_pieces_from_everywhere():
    image = np.arange(40 * 30 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 30, 3)
    places = np.zeros((17, 7), int)
    marked = np.zeros((40, 30, 3), np.uint8)
    for row in range(40):
        marked[row, :, 0], marked[row, :, 1] = row, range(30)
    for key in range(3000):
        piece = random_crop(marked, key, 24)
        top, left = piece[0, 0, :2]
        assert np.array_equal(piece, marked[top : top + 24, left : left + 24])
        places[top, left] += 1
    assert places.min() > 5  # of 25 in the mean
    assert random_crop(image[:10], 0, 24).shape == (24, 24, 3)


def test_resized_crops_are_as_published():
    boxes = np.array([resized_crop_box(224, 224, (0.08, 1), key) for key in range(4000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 224).all()
    assert (left + width <= 224).all()
    areas, ratios = height * width / 224**2, width / height
    torch.manual_seed(0)
    picture = torch.empty(3, 224, 224)
    drawn = [RandomResizedCrop.get_params(picture, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(4000)]
    _, _, their_height, their_width = np.array(drawn).T
    shares = np.linspace(0.02, 0.98, 9)
    for ours, theirs in ((areas, their_height * their_width / 224**2), (ratios, their_width / their_height)):
        assert np.allclose(np.quantile(ours, shares), np.quantile(theirs, shares), atol=0.04)
    assert len(set(map(tuple, boxes.tolist()))) > 3900


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 500), (500, 5), (1, 900)])
def test_a_crop_of_any_shape_can_be_had(height, width):
    for key in range(20):
        top, left, h, w = resized_crop_box(height, width, (0.5, 1), key)
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert h * w > 0
        assert random_resized_crop(noise(height, width), key, 8, (0.5, 1)).shape == (8, 8, 3)


@pytest.mark.parametrize("side", [20, 48, 100])
def test_resizing_is_pillows_bicubic(side):
    image = smooth(side)
    want = np.asarray(Image.fromarray(image).resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(resize(image, 48) - want).max() <= 2
    assert np.array_equal(resize(image[:, ::-1], 48), resize(np.ascontiguousarray(image[:, ::-1]), 48))


def test_erased_rectangles_are_as_published():
    boxes = erased_boxes(np.arange(8000, dtype=np.uint64), 224, 224, 0.25)
    top, left, height, width = boxes[boxes[:, 2] > 0].T
    assert len(top) / 8000 == pytest.approx(0.25, abs=0.02)
    areas, ratios = height * width / 224**2, height / width
    assert 0.018 < areas.min() < 0.03
    assert 0.3 < areas.max() < 0.35
    assert areas.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    assert ratios.min() > 0.28
    assert ratios.max() < 3.6
    assert (top + height <= 224).all()
    assert (left + width <= 224).all()


def test_erasing_puts_noise_there_and_leaves_the_rest():
    images = torch.full((64, 3, 40, 32), 7.0)
    erased = erase(images.clone(), KEYS, 0.5)
    boxes = erased_boxes(KEYS, 40, 32, 0.5)
    values = []
    for image, (top, left, height, width) in zip(erased, boxes.tolist(), strict=True):
        piece = image[:, top : top + height, left : left + width]
        values.append(piece.flatten().clone())
        piece.fill_(7.0)
        assert (image == 7.0).all()
    together = torch.cat(values)
    assert float(together.mean()) == pytest.approx(0, abs=0.05)
    assert float(together.std()) == pytest.approx(1, abs=0.05)
    assert torch.equal(erase(images.clone(), KEYS, 0.5), erase(images.clone(), KEYS, 0.5))
    assert torch.equal(erase(images.clone(), KEYS, 0.0), images)


def test_mixing_makes_soft_targets_of_pairs():
    chosen = recipe(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    labels = torch.arange(8)
    pure = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, 16, 16)
    kinds = set()
    for key in range(40):
        images, targets = mixed(pure.clone(), labels, np.array([key] * 8, np.uint64), chosen, 10)
        assert (targets.shape, targets.dtype) == ((8, 10), torch.float32)
        assert torch.allclose(targets.sum(1), torch.ones(8))
        share = float((targets[0, 0] - 0.01) / 0.9)  # of the first image in itself
        assert float(images[0].mean()) == pytest.approx(7 * (1 - share), abs=0.01)
        kinds.add("mixup" if len(images[0].unique()) == 1 else "cutmix")
        again = mixed(pure.clone(), labels, np.array([key] * 8, np.uint64), chosen, 10)
        assert torch.equal(images, again[0])
        assert torch.equal(targets, again[1])
    assert kinds == {"mixup", "cutmix"}


def test_nothing_to_mix():
    images, labels = torch.zeros(3, 3, 4, 4), torch.tensor([0, 2, 1])
    assert mixed(images, labels, KEYS[:3], recipe(), 5) == (images, labels)
    _, soft = mixed(images, labels, KEYS[:3], recipe(label_smoothing=0.1), 5)
    assert torch.allclose(soft, mixup_target(labels, 5, 1.0, 0.1))
    assert torch.equal(soft, smoothed(labels, 0.1, 5))


def test_mixed_images_of_several_classes_show_the_classes_of_both():
    shown = torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    pure = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    images, targets = mixed(pure.clone(), shown, KEYS[:4], recipe(mixup=0.8, label_smoothing=0.1), 3)
    share = 1 - float(images[0].mean()) / 3  # of the first image in itself
    assert 0 < share < 1
    assert torch.allclose(targets[0], share * shown[0] + (1 - share) * shown[3])
    assert torch.allclose(targets[1], share * shown[1] + (1 - share) * shown[2])
