"""From stored images to what a model sees: geometry per sample on the CPU, numbers per batch on the device."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from fractaltrain.data.source import Images
from fractaltrain.recipes.recipe import Recipe

_PADDING = 8  # the reflected border is 1/8 of the image on each side
_DEGREES = 10.0
_SHIFT = (0.0, 1 / 8)  # of the padded image: none along x, up to an eighth along y, as torchvision reads it
_ZOOM = (1.0, 1.2)


@dataclass(frozen=True)
class Geometry:
    """Makes images square and as large as the model wants, then augments them.

    Pillow does it, as in the published code: its affine map is three times as fast as torchvision's on tensors.
    Any randomness comes from torch's CPU generator.
    """

    image_size: int
    augment: v2.Transform | None

    def __call__(self, image: Images) -> torch.Tensor:
        """(H, W, 3) uint8 to (3, S, S) uint8, bilinear with antialiasing; an image that fits stays as it is."""
        if self.augment is None and image.shape[:2] == (self.image_size, self.image_size):
            writeable = image if image.flags.writeable else np.array(image)  # torch warns of what it might write to
            return torch.from_numpy(writeable).permute(2, 0, 1)
        picture = Image.fromarray(image).resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
        if self.augment is not None:
            picture = self.augment(picture)
        tensor: torch.Tensor = v2.functional.pil_to_tensor(picture)
        return tensor


def training_geometry(recipe: Recipe, image_size: int) -> Geometry:
    """The geometry of training images. ``affine`` is the published augmentation for fine-tuning; it takes the nearest
    pixel, and what comes from outside the padded image is black."""
    steps: list[v2.Transform] = []
    if recipe.augment == "affine":
        steps += [
            v2.Pad(image_size // _PADDING, padding_mode="reflect"),
            v2.RandomAffine(_DEGREES, translate=_SHIFT, scale=_ZOOM),
            v2.CenterCrop(image_size),
        ]
    if recipe.hflip:
        steps.append(v2.RandomHorizontalFlip(recipe.hflip))
    return Geometry(image_size, v2.Compose(steps) if steps else None)


def evaluation_geometry(image_size: int) -> Geometry:
    """The geometry of held-out images: resized, nothing else."""
    return Geometry(image_size, augment=None)


def to_input(images: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Images (b, 3, S, S) uint8 on any device to float32: [0, 1], then minus the mean, divided by the deviation."""
    mean = torch.tensor(recipe.mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(recipe.std, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std
