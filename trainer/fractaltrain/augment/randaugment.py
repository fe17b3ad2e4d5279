"""RandAugment and colour jitter: which operation each image gets, at which level.

RandAugment (Cubuk et al., 2020) as in timm's ``rand-mM-mstd0.5-inc1``: two operations an image, each of 15 with equal
chance and applied with probability 0.5, at a magnitude from N(M, 0.5) cut to 0..9.999. ``timm_randaugment`` is timm's,
on single images through Pillow; ``randaugment`` does the same to batches on a device.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from fractaltrain.augment import operations
from fractaltrain.augment.operations import Fill, Operation
from fractaltrain.data.source import Images
from fractaltrain.stream.bits import Bits, Draw, mix, uniforms
from fractaltrain.stream.seeding import seeded_numpy

Numbers = npt.NDArray[np.float64]
Level = Callable[[Numbers, Numbers], Numbers]

_LAYERS = 2
_PROBABILITY = 0.5
_DEVIATION = 0.5
_SCALE = 10.0
_MOST = 9.999  # at 10, Posterize would keep no bits: a black image, which Pillow refuses to make


def randaugment(images: Tensor, keys: Bits, magnitude: float, fill: Fill) -> Tensor:
    """RandAugment of a batch (b, 3, H, W) uint8 on its device, drawn by the keys (b,) of its samples."""
    policy = _policy(fill)
    numbers = uniforms(keys, Draw.RANDAUGMENT, 5 * _LAYERS).reshape(len(keys), _LAYERS, 5)
    images = images.clone()
    for layer in range(_LAYERS):
        which, chance, radius, angle, sign = numbers[:, layer].T
        gauss = np.sqrt(-2 * np.log(1 - radius)) * np.cos(2 * np.pi * angle)  # Box and Muller
        strengths = np.clip(magnitude + _DEVIATION * gauss, 0, _MOST) / _SCALE
        signs = np.where(sign < 0.5, -1.0, 1.0)
        chosen = np.where(chance < _PROBABILITY, (which * len(policy)).astype(int), -1)
        for number, (operation, level) in enumerate(policy):
            _apply(operation, images, chosen == number, level(strengths, signs))
    return images


def color_jitter(images: Tensor, keys: Bits, strength: float) -> Tensor:
    """Brightness, contrast and saturation of a batch, in an order of each image's own, by factors U(1 - s, 1 + s)."""
    numbers = uniforms(keys, Draw.JITTER, 6)
    orders = np.argsort(numbers[:, :3], axis=1)
    factors = 1 + strength * (2 * numbers[:, 3:] - 1)
    images = images.clone()
    for place in range(3):
        for number, operation in enumerate((operations.brightness, operations.contrast, operations.color)):
            _apply(operation, images, orders[:, place] == number, factors[:, number])
    return images


def timm_randaugment(image_size: int, magnitude: float, fill: Fill) -> Callable[[Images, int], Images]:
    """timm's RandAugment of an image (H, W, 3) uint8 by its key: the reference."""
    figures = {
        "translate_const": int(image_size * 0.45),
        "img_mean": fill,
        "interpolation": Image.Resampling.BICUBIC,
        "magnitude_max": _MOST,
    }
    augment = rand_augment_transform(f"rand-mstd{_DEVIATION:g}-inc1", figures)
    for operation in augment.ops:
        operation.magnitude = magnitude  # in its text timm takes whole numbers only

    def apply(image: Images, key: int) -> Images:
        with seeded_numpy(mix(key, Draw.RANDAUGMENT)):
            return np.asarray(augment(Image.fromarray(image)))

    return apply


def _apply(operation: Operation, images: Tensor, chosen: npt.NDArray[np.bool_], levels: Numbers) -> None:
    """Change the chosen images in place."""
    if not chosen.any():
        return
    indices = torch.from_numpy(np.flatnonzero(chosen)).to(images.device)
    some = torch.from_numpy(levels[chosen]).float().to(images.device)
    images[indices] = operation(images[indices], some)


def _policy(fill: Fill) -> list[tuple[Operation, Level]]:
    """All operations, and how their levels follow from strength in [0, 1] and sign; as timm's increasing set."""

    def none(strength: Numbers, sign: Numbers) -> Numbers:
        return strength

    def factor(strength: Numbers, sign: Numbers) -> Numbers:
        return np.maximum(0.1, 1 + sign * strength * 0.9)

    def signed(most: float) -> Level:
        return lambda strength, sign: sign * strength * most

    return [
        (operations.auto_contrast, none),
        (operations.equalize, none),
        (operations.invert, none),
        (operations.rotate(fill), signed(30)),
        (operations.posterize, lambda strength, sign: 4 - np.floor(strength * 4)),
        (operations.solarize, lambda strength, sign: 256 - np.floor(strength * 256)),
        (operations.solarize_add, lambda strength, sign: np.floor(strength * 110)),
        (operations.color, factor),
        (operations.contrast, factor),
        (operations.brightness, factor),
        (operations.sharpness, factor),
        (operations.shear(0, fill), signed(0.3)),
        (operations.shear(1, fill), signed(0.3)),
        (operations.translate(0, fill), signed(0.45)),
        (operations.translate(1, fill), signed(0.45)),
    ]
