"""From stored images to what a model sees: geometry per sample in loader workers, the rest per batch on the device."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from fractaltrain.augment.crop import centre_crop, random_crop, random_resized_crop, resized_centre_crop
from fractaltrain.augment.erasing import erase
from fractaltrain.augment.mixing import mixed
from fractaltrain.augment.operations import Fill
from fractaltrain.augment.randaugment import color_jitter, randaugment, timm_randaugment
from fractaltrain.data.source import Images
from fractaltrain.recipes.recipe import Recipe
from fractaltrain.stream.bits import Draw, uniforms
from fractaltrain.stream.loader import Batch
from fractaltrain.stream.seeding import seeded

_PADDING = 8  # the reflected border is 1/8 of the image on each side
_DEGREES = 10.0
_SHIFT = (0.0, 1 / 8)  # of the padded image: none along x, up to an eighth along y, as torchvision reads it
_ZOOM = (1.0, 1.2)

Change = Callable[[Images, int], Images]


@dataclass(frozen=True)
class Geometry:
    """Makes images square and as large as the model wants, and augments them: ``steps`` in order."""

    image_size: int
    steps: tuple[Change, ...]

    def __call__(self, image: Images, key: int) -> Images:
        """(H, W, 3) uint8 to (S, S, 3) uint8; any randomness comes from ``key``."""
        for step in self.steps:
            image = step(image, key)
        return image


def training_geometry(recipe: Recipe, image_size: int, device: torch.device) -> Geometry:
    """The geometry of training images; where there is no accelerator, timm's RandAugment too."""
    steps: list[Change] = []
    if recipe.crop == "random":
        steps.append(partial(random_crop, size=image_size))
    elif recipe.crop == "resized":
        steps.append(partial(random_resized_crop, size=image_size, scale=recipe.crop_scale))
    else:
        steps.append(partial(_fit, size=image_size))
    if recipe.augment == "affine":
        steps.append(_affine(recipe, image_size))
    elif recipe.hflip:
        steps.append(partial(_flip, probability=recipe.hflip))
    if recipe.randaugment and device.type == "cpu":
        steps.append(timm_randaugment(image_size, recipe.randaugment, _fill(recipe)))
    return Geometry(image_size, tuple(steps))


def evaluation_geometry(recipe: Recipe, image_size: int) -> Geometry:
    """The geometry of held-out images: resized; or their middle, where training sees pieces.

    Of pieces at full scale it is the middle at full scale; of resized ones that of the image whose shorter side is 8/7
    of what the model sees (256 for 224, as DeiT and torchvision's references have it): squares lose a little of their
    border, and no image its shape.
    """
    fit = {"none": _fit, "random": centre_crop, "resized": resized_centre_crop}[recipe.crop]
    return Geometry(image_size, (partial(fit, size=image_size),))


def training_batch(
    batch: Batch, recipe: Recipe, classes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model sees of a batch, and what it shall say of it, on the device.

    Returns:
        Images (b, 3, S, S) float32; labels (b,) int64, or (b, classes) float32 where images show several classes or
        the recipe mixes or smooths them.
    """
    images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
    if recipe.randaugment:
        if device.type != "cpu":
            images = randaugment(images, batch.sample_keys, recipe.randaugment, _fill(recipe))
    elif recipe.color_jitter:
        images = color_jitter(images, batch.sample_keys, recipe.color_jitter)
    inputs = to_input(images, recipe)
    if recipe.erasing:
        inputs = erase(inputs, batch.sample_keys, recipe.erasing)
    return mixed(inputs, labels, batch.sample_keys, recipe, classes)


def to_input(images: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Images (b, 3, S, S) uint8 on any device to float32: [0, 1], then minus the mean, divided by the deviation."""
    mean = torch.tensor(recipe.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(recipe.std, device=images.device).view(3, 1, 1)
    inputs = images.to(torch.float32, memory_format=torch.contiguous_format)
    return inputs.div_(255).sub_(mean).div_(std)  # in place: new memory costs more than the arithmetic


def _fit(image: Images, _key: int, size: int) -> Images:
    """``size`` x ``size``, bilinear with antialiasing; an image that fits stays as it is."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def _flip(image: Images, key: int, probability: float) -> Images:
    flipped = uniforms(np.array([key], np.uint64), Draw.FLIP, 1)[0, 0] < probability
    return image[:, ::-1] if flipped else image


def _affine(recipe: Recipe, image_size: int) -> Change:
    """The published augmentation for fine-tuning; it takes the nearest pixel, and what comes from outside the padded
    image is black. Pillow does it, as there: its affine map is three times as fast as torchvision's on tensors."""
    augment = v2.Compose(
        [
            v2.Pad(image_size // _PADDING, padding_mode="reflect"),
            v2.RandomAffine(_DEGREES, translate=_SHIFT, scale=_ZOOM),
            v2.CenterCrop(image_size),
            *([v2.RandomHorizontalFlip(recipe.hflip)] if recipe.hflip else []),
        ]
    )

    def apply(image: Images, key: int) -> Images:
        with seeded(key):
            return np.asarray(augment(Image.fromarray(image)))

    return apply


def _fill(recipe: Recipe) -> Fill:
    """The colour that becomes 0 when it is normalised: what comes from outside of an image."""
    red, green, blue = (min(255, round(255 * mean)) for mean in recipe.mean)
    return red, green, blue
