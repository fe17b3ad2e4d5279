"""What a command line asks for, as frozen records: they travel to every process, and need neither torch nor timm."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fractaltrain.data.finetuning import FOLDER_PREFIX, DataChoice
from fractaltrain.recipes.recipe import Recipe

Amp = Literal["auto", "bf16", "fp16", "fp32"]
OnBadSample = Literal["stop", "skip"]


@dataclass(frozen=True)
class Running:
    """What pre-training and fine-tuning have in common.

    Attributes:
        recipe: with all overrides applied.
        out: the run's folder.
        seed: of everything random but the choice of a subset.
        pad: train on all samples of an epoch, filling the last batch with its first ones.
        amp: precision of the forward pass.
        workers: loader processes of each training process; None: chosen by the cores there are.
        on_bad_sample: stop at a sample that cannot be read, or skip it: go on with another in its place.
        save_every_minutes: time between checkpoints inside an epoch; there is one after every epoch anyway.
    """

    recipe: Recipe
    out: Path
    seed: int
    pad: bool
    amp: Amp
    workers: int | None
    save_every_minutes: float
    on_bad_sample: OnBadSample = "stop"


@dataclass(frozen=True)
class Pretraining:
    """``fractaltrain pt``. ``window`` is in shards; ``image_size`` None means that of the dataset."""

    running: Running
    shards: Path
    model: str
    image_size: int | None
    window: int


@dataclass(frozen=True)
class Finetuning:
    """``fractaltrain ft``. ``weights`` is the folder of a run; None means random weights of ``model``.

    ``image_size`` None means that of the pre-training, or 224 without.
    """

    running: Running
    weights: Path | None
    model: str
    data: DataChoice
    image_size: int | None


def pretraining_folder(shards: Path, model: str, recipe: Recipe) -> Path:
    """``runs/<dataset>-<model>-<recipe>``."""
    return Path("runs") / f"{shards.resolve().name}-{model}-{recipe.name}"


def finetuning_folder(weights: Path | None, model: str, data: DataChoice, recipe: Recipe) -> Path:
    """``runs/<data>-<what it starts from>-<recipe>``, with the subset in the name where there is one."""
    name = Path(data.name.removeprefix(FOLDER_PREFIX)).resolve().name
    subset = "" if data.per_class is None else f"-{data.per_class}-per-class-{data.subset_seed}"
    start = model if weights is None else f"from-{weights.resolve().name}"
    return Path("runs") / f"{name}{subset}-{start}-{recipe.name}"
