"""Mixup and cutmix of a batch through timm, and label smoothing: soft targets for the loss."""

from collections.abc import Callable

import torch
from timm.data.mixup import Mixup
from torch import Tensor
from torch.nn import functional

from fractaltrain.recipes.recipe import Recipe
from fractaltrain.stream.bits import Bits, Draw, mix
from fractaltrain.stream.seeding import seeded_numpy


def mixed(images: Tensor, labels: Tensor, keys: Bits, recipe: Recipe, classes: int) -> tuple[Tensor, Tensor]:
    """Images, in place, and their targets: labels as they are, or (b, classes) float32 if they are soft.

    Each image is mixed with its partner from the other end of the batch, all in the same proportion (Zhang et al.,
    ICLR 2018), or has a rectangle of it pasted in (Yun et al., ICCV 2019); the first key draws which.

    Args:
        images: (b, 3, H, W) float, b even where pairs are made.
        labels: (b,) int64; or (b, classes) float32 of images with several classes, which are mixed, but not smoothed:
            their losses are of each class by itself, and none is certain to be absent because another is there.
    """
    if labels.ndim == 1 and recipe.label_smoothing:
        labels = smoothed(labels, recipe.label_smoothing, classes)
    if not recipe.mixes:
        return images, labels
    if labels.ndim == 1:
        labels = functional.one_hot(labels, classes).float()
    mixing: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = Mixup(
        recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=len(images)
    )
    with seeded_numpy(mix(int(keys[0]), Draw.MIX)):
        images, shares = mixing(images, torch.arange(len(images), device=images.device))
    return images, shares @ labels  # row i of shares: how much of each image of the batch is in image i


def smoothed(labels: Tensor, share: float, classes: int) -> Tensor:
    """Labels (b,) as shares of classes (b, classes) float32, of which ``share`` is spread over all classes."""
    return functional.one_hot(labels, classes) * (1 - share) + share / classes
