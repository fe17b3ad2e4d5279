"""A training recipe: every hyperparameter of a training in one frozen record, each of which can be changed by name."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from fractalshards.errors import UsageError
from fractalshards.human import human_count
from fractalshards.settings import override

Channels = tuple[float, float, float]

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)


_RANGES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (  # fields, their range, and whether a value is in it
    ("epochs batch_size repeats passes", "at least 1", lambda value: value >= 1),
    ("lr head_lr_factor div_factor final_div_factor", "above 0", lambda value: value > 0),
    ("weight_decay warmup_epochs warmup_steps warmup_lr min_lr mixup cutmix", "at least 0", lambda value: value >= 0),
    ("pct_start momentum base_momentum max_momentum gamma hflip vflip", "from 0 to 1", lambda value: 0 <= value <= 1),
    ("color_jitter erasing label_smoothing drop_path", "from 0 to 1", lambda value: 0 <= value <= 1),
    ("head_weight_decay", "at least 0, or none", lambda value: value is None or value >= 0),
    ("clip_grad", "above 0, or none", lambda value: value is None or value > 0),
    ("randaugment", "from 0 to 10", lambda value: 0 <= value <= 10),
    ("ema", "at least 0 and below 1", lambda value: 0 <= value < 1),
    ("milestones", "two epochs, the earlier one first", lambda epochs: 0 < epochs[0] <= epochs[1]),
    ("crop_scale", "two shares above 0, the lower one first", lambda shares: 0 < shares[0] <= shares[1] <= 1),
    ("mean", "finite", lambda values: True),
    ("std", "above 0", lambda values: min(values) > 0),
)


@dataclass(frozen=True)
class TrainRecipe:
    """Hyperparameters of a training.

    Attributes:
        name: as ``--recipe`` takes it.
        epochs: epochs of ``passes`` passes over the training samples.
        passes: passes over the training samples in an epoch. Small datasets need many, because checkpoints, log lines
            and starting loader workers take time once per epoch.
        batch_size: global batch size, split equally among all processes.
        lr: peak learning rate, for this ``batch_size``.
        weight_decay: applies to all parameters that ``undecayed`` does not exclude.
        undecayed: parameters without weight decay: ``norms``: norms and biases; ``vectors``: these, class token and
            position embedding; ``none``: no exceptions.
        optimizer: ``sgd``, or ``adamw`` with torch's betas.
        momentum: SGD's, unless the schedule cycles it.
        schedule: ``onecycle``: torch's OneCycleLR, one cosine up and one down, which also cycles the momentum;
            ``cosine``: a linear warm-up, then a cosine; ``step``: multiply by ``gamma`` at every milestone.
        head_lr_factor: multiplies the learning rate of the classifier.
        head_weight_decay: weight decay of the classifier's weight; None: ``weight_decay``.
        pct_start: ``onecycle``: share of all steps in which the learning rate rises.
        div_factor: ``onecycle``: the learning rate starts at ``lr / div_factor`` ...
        final_div_factor: ... and ends at ``lr / div_factor / final_div_factor``.
        base_momentum: ``onecycle``: momentum at the highest learning rate.
        max_momentum: ``onecycle``: momentum at the lowest learning rate.
        warmup_epochs: ``cosine``: epochs in which the learning rate rises from ``warmup_lr``.
        warmup_steps: ``cosine``: optimiser steps in which it does, instead of epochs; 0: ``warmup_epochs`` counts.
        min_lr: ``cosine``: final learning rate.
        milestones: ``step``: epochs after which the learning rate is multiplied by ``gamma``.
        clip_grad: maximum norm of the gradient over all parameters; None: no clipping.
        augment: ``none``, or ``affine``: reflection padding by an eighth, small rotation, shift and zoom, centre crop.
        crop: training images are ``none``: resized as a whole; ``random``: cropped at a random place to the size that
            the model takes; ``resized``: cropped at random size and aspect ratio (RandomResizedCrop), bicubic.
        crop_scale: ``resized``: lowest and highest share of the image area.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        randaugment: magnitude of RandAugment with two operations per image, timm's ``rand-mM-mstd0.5-inc1``; 0: off.
        color_jitter: largest relative change of brightness, contrast and saturation; off where RandAugment is on.
        erasing: probability that a random rectangle is filled with noise (random erasing).
        mixup: alpha of the Beta distribution for mixup; 0: off.
        cutmix: alpha of the Beta distribution for CutMix; 0: off. With both, each batch uses one at random.
        label_smoothing: share of the target that is spread over all classes.
        drop_path: largest rate of stochastic depth, that of the last block (Huang et al. 2016); an error for models
            without it.
        ema: decay per step of the moving average of the weights, which is then evaluated and fine-tuned; 0: off. After
            step k the decay is at most 1 - k^(-2/3), so that the random initialisation fades quickly.
        repeats: repeated augmentation: an epoch takes one in ``repeats`` samples, each ``repeats`` times.
        mean: subtracted from each channel of images in [0, 1].
        std: each channel is divided by it afterwards.
    """

    name: str
    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    undecayed: Literal["norms", "vectors", "none"] = "norms"
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    schedule: Literal["onecycle", "cosine", "step"] = "onecycle"
    head_lr_factor: float = 1.0
    head_weight_decay: float | None = None
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    base_momentum: float = 0.85
    max_momentum: float = 0.95
    warmup_epochs: int = 0
    warmup_steps: int = 0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    milestones: tuple[int, int] = (30, 60)
    gamma: float = 0.1
    clip_grad: float | None = None
    augment: Literal["none", "affine"] = "none"
    crop: Literal["none", "random", "resized"] = "none"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.0
    vflip: float = 0.0
    randaugment: float = 0.0
    color_jitter: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    drop_path: float = 0.0
    ema: float = 0.0
    repeats: int = 1
    passes: int = 1
    mean: Channels = (0.0, 0.0, 0.0)
    std: Channels = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        """Check every value; raises UsageError naming the field and its range."""
        for names, text, fits in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                numbers = value if isinstance(value, tuple) else (value,)
                if not fits(value) or not all(number is None or math.isfinite(number) for number in numbers):
                    raise UsageError(f"{name} is {value}, but must be {text}")
        if self.schedule == "cosine" and not self.warmup_steps and self.warmup_epochs >= self.epochs:
            problem = f"{self.warmup_epochs} warm-up epochs do not fit into {human_count(self.epochs, 'epoch')}"
            raise UsageError(f"{problem}; lower them with --set warmup_epochs=N")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs, which needs an even batch in every process."""
        return self.mixup > 0 or self.cutmix > 0


_RATES = ("lr", "warmup_lr", "min_lr")


def change(recipe: TrainRecipe, changes: Mapping[str, str]) -> TrainRecipe:
    """Return the recipe with other values, given as text: ``{"lr": "0.05", "mean": "0.5"}``.

    Raises UsageError if a field does not exist, or its text does not fit its type or range.
    """
    return override(recipe, changes, fixed=("name",))


def scale_lr(recipe: TrainRecipe, published_batch_size: int) -> TrainRecipe:
    """Scale all learning rates linearly from the published batch size to that of the recipe."""
    rates = {name: getattr(recipe, name) * recipe.batch_size / published_batch_size for name in _RATES}
    return replace(recipe, **rates)
