"""From stored images to what a model sees: geometry per sample on the CPU, numbers per batch on the device."""

import torch
from torchvision.transforms import v2

from fractaltrain.recipes.recipe import Recipe
from fractaltrain.stream.loader import Transform

_PADDING = 8  # the reflected border is 1/8 of the image on each side
_DEGREES = 10.0
_SHIFT = (0.0, 1 / 8)  # of the padded image: none along x, up to an eighth along y, as torchvision reads it
_ZOOM = (1.0, 1.2)


def training_transform(recipe: Recipe, image_size: int) -> Transform:
    """The geometry of training images: (3, H, W) uint8 to (3, S, S) uint8, bilinear with antialiasing.

    ``affine`` is the published fine-tuning augmentation, whose affine map takes the nearest pixel.
    """
    steps: list[v2.Transform] = [v2.Resize((image_size, image_size))]
    if recipe.augment == "affine":
        steps += [
            v2.Pad(image_size // _PADDING, padding_mode="reflect"),
            v2.RandomAffine(_DEGREES, translate=_SHIFT, scale=_ZOOM),
            v2.CenterCrop(image_size),
        ]
    if recipe.hflip:
        steps.append(v2.RandomHorizontalFlip(recipe.hflip))
    compose: Transform = v2.Compose(steps)
    return compose


def evaluation_transform(image_size: int) -> Transform:
    """The geometry of held-out images: resized, nothing else."""
    resize: Transform = v2.Resize((image_size, image_size))
    return resize


def to_input(images: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Images (b, 3, S, S) uint8 on any device to float32: [0, 1], then minus the mean, divided by the deviation."""
    mean = torch.tensor(recipe.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(recipe.std, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std
