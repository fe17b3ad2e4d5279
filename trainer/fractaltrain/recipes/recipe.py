"""What a recipe is: every figure of a training, in one frozen record, overridable by name."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from fractalshards.errors import UsageError
from fractalshards.settings import override

Channels = tuple[float, float, float]

IMAGENET_MEAN: Channels = (0.485, 0.456, 0.406)
IMAGENET_STD: Channels = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Recipe:
    """Figures of one training. ``lr`` is meant for ``batch_size``, the global batch.

    Attributes:
        name: as ``--recipe`` calls it.
        epochs: passes over the training samples.
        batch_size: global batch, shared equally by all processes.
        lr: peak learning rate.
        weight_decay: of everything that is not ``undecayed``.
        undecayed: what has no weight decay: ``norms``: norms and biases; ``vectors``: these, class token and position
            embedding; ``none``: nothing, all decays.
        optimizer: ``sgd``, or ``adamw`` with torch's betas.
        momentum: of SGD, unless the schedule cycles it.
        schedule: ``onecycle``: torch's OneCycleLR, a cosine up and one down, which also cycles the momentum;
            ``cosine``: a linear warm-up, then a cosine; ``step``: times ``gamma`` at every milestone.
        head_lr_factor: the classifier learns so much faster.
        head_weight_decay: of the classifier's weight; None: as everything else.
        pct_start: ``onecycle``: share of all steps in which the learning rate rises.
        div_factor: ``onecycle``: it starts at ``lr / div_factor`` ...
        final_div_factor: ... and ends at ``lr / div_factor / final_div_factor``.
        base_momentum: ``onecycle``: momentum where the learning rate is highest.
        max_momentum: ``onecycle``: momentum where it is lowest.
        warmup_epochs: ``cosine``: epochs in which the learning rate rises from ``warmup_lr``.
        min_lr: ``cosine``: where it ends.
        milestones: ``step``: epochs after which the learning rate is multiplied by ``gamma``.
        clip_grad: largest norm of the gradients of all parameters together; None: no limit.
        augment: ``none``, or ``affine``: reflect padding by an eighth, small rotation, shift and zoom, centre crop.
        crop: of training images: ``none``: all of it, resized; ``random``: a piece of the size that the model sees;
            ``resized``: a piece of random size and shape (RandomResizedCrop), bicubic.
        crop_scale: share of the area that a ``resized`` crop takes, lowest and highest.
        hflip: probability of a horizontal flip of a training image.
        randaugment: magnitude of RandAugment, two operations an image: timm's ``rand-mM-mstd0.5-inc1``; 0: none.
        color_jitter: brightness, contrast and saturation change by up to this share; not beside RandAugment.
        erasing: probability that a rectangle of a training image becomes noise.
        mixup: alpha of the Beta distribution that mixes pairs of images and their labels; 0: none.
        cutmix: the same for pasted rectangles; with both, each batch takes one or the other.
        label_smoothing: share of a label that is spread over all classes.
        drop_path: largest rate of stochastic depth, of the last block (Huang et al. 2016); models without it refuse.
        ema: decay per step of an average of the weights, which is then what is evaluated and fine-tuned; 0: none. It
            grows to this: after step k it is at most 1 - k^(-2/3), so that the random start is soon forgotten.
        repeats: repeated augmentation: an epoch takes so many times fewer samples, each so many times.
        mean: subtracted per channel from images in [0, 1].
        std: divided by per channel afterwards.
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
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    milestones: tuple[int, int] = (30, 60)
    gamma: float = 0.1
    clip_grad: float | None = None
    augment: Literal["none", "affine"] = "none"
    crop: Literal["none", "random", "resized"] = "none"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    hflip: float = 0.0
    randaugment: float = 0.0
    color_jitter: float = 0.0
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    drop_path: float = 0.0
    ema: float = 0.0
    repeats: int = 1
    mean: Channels = (0.0, 0.0, 0.0)
    std: Channels = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        """Check every figure.

        Raises:
            UsageError: naming the field and what it may be.
        """
        at_least_one = ("epochs", "batch_size", "repeats")
        positive = ("lr", "head_lr_factor", "div_factor", "final_div_factor")
        positive_or_none = ("clip_grad",)
        not_negative = ("weight_decay", "head_weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "mixup", "cutmix")
        shares = (
            *("pct_start", "momentum", "base_momentum", "max_momentum", "gamma"),
            *("hflip", "color_jitter", "erasing", "label_smoothing", "drop_path"),
        )
        for name in at_least_one:
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in positive:
            _check(self, name, getattr(self, name) > 0, "above 0")
        for name in positive_or_none:
            _check(self, name, getattr(self, name) is None or getattr(self, name) > 0, "above 0, or none")
        for name in not_negative:
            _check(self, name, (getattr(self, name) or 0) >= 0, "at least 0")
        for name in shares:
            _check(self, name, 0 <= getattr(self, name) <= 1, "from 0 to 1")
        if self.schedule == "cosine":
            _check(
                self, "warmup_epochs", self.warmup_epochs < self.epochs, f"below the number of epochs, {self.epochs}"
            )
        _check(self, "ema", 0 <= self.ema < 1, "at least 0 and below 1")
        _check(self, "milestones", 0 < self.milestones[0] <= self.milestones[1], "two epochs, the earlier one first")
        _check(self, "std", min(self.std) > 0, "above 0")
        low, high = self.crop_scale
        _check(self, "crop_scale", 0 < low <= high <= 1, "two shares, the lower one first, above 0")
        _check(self, "randaugment", 0 <= self.randaugment <= 10, "from 0 to 10")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs, so that a process needs an even number of them."""
        return self.mixup > 0 or self.cutmix > 0


def change(recipe: Recipe, changes: Mapping[str, str]) -> Recipe:
    """The recipe with other figures, given as text: ``{"lr": "0.05", "mean": "0.5"}``.

    Raises:
        UsageError: if there is no such field, or the text is not a value of it.
    """
    return override(recipe, changes, fixed=("name",))


def scale_lr(recipe: Recipe, published_batch_size: int) -> Recipe:
    """The recipe with its learning rate scaled linearly from the batch it was published for to its own."""
    return replace(recipe, lr=recipe.lr * recipe.batch_size / published_batch_size)


def _check(recipe: Recipe, name: str, good: bool, wanted: str) -> None:
    value = getattr(recipe, name)
    numbers = value if isinstance(value, tuple) else (value,)
    if not good or not all(number is None or math.isfinite(number) for number in numbers):
        raise UsageError(f"{name} is {value}, but must be {wanted}")
