"""Mixup and cutmix of a batch through timm, and label smoothing: soft targets for the cross-entropy."""

from collections.abc import Callable

from timm.data.mixup import Mixup
from torch import Tensor
from torch.nn import functional

from fractalshards.errors import UsageError
from fractaltrain.recipes.recipe import Recipe
from fractaltrain.stream.bits import Bits, Draw, mix
from fractaltrain.stream.seeding import seeded_numpy


def mixed(images: Tensor, labels: Tensor, keys: Bits, recipe: Recipe, classes: int) -> tuple[Tensor, Tensor]:
    """Images, in place, and their targets: labels (b,) int64 as they are, or (b, classes) float32 if they are soft.

    Each image is mixed with its partner from the other end of the batch, all in the same proportion (Zhang et al.,
    ICLR 2018), or has a rectangle of it pasted in (Yun et al., ICCV 2019); the first key draws which.

    Raises:
        UsageError: if pairs cannot be made of the batch.
    """
    if not (recipe.mixup or recipe.cutmix):
        return images, smoothed(labels, recipe.label_smoothing, classes) if recipe.label_smoothing else labels
    if len(images) % 2:
        raise UsageError(
            f"mixup and cutmix take pairs of images, but a process has {len(images)} of a batch; change --batch-size"
        )
    mixing: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = Mixup(
        recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes
    )
    with seeded_numpy(mix(int(keys[0]), Draw.MIX)):
        return mixing(images, labels)


def smoothed(labels: Tensor, share: float, classes: int) -> Tensor:
    """Labels (b,) as shares of classes (b, classes) float32, of which ``share`` is spread over all classes."""
    return functional.one_hot(labels, classes) * (1 - share) + share / classes
