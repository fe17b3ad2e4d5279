"""What a command line asks for, as frozen records: they travel to every process, and need neither torch nor timm."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fractalshards.remote.stores import parse_location
from fractaltrain.data.images import DataChoice
from fractaltrain.recipes.recipe import TrainRecipe

WINDOW = 16
"""Shards that are shuffled together, unless asked otherwise."""

Amp = Literal["auto", "bf16", "fp16", "fp32"]
Resume = Literal["auto", "never", "must"]
OnBadSample = Literal["stop", "skip"]
Freeze = Literal["backbone"]
Start = Path | Literal["timm"] | None  # of a fine-tuning: a run, timm's published weights, or random ones


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
        keep: checkpoints that are kept, the newest ones.
        resume: whether to continue what is in the folder: if it is there, not at all, or nothing else.
        accumulate: parts of each process's batch that are computed one after the other, to save memory.
        compile: run the model through torch.compile.
        deterministic: the same bits again on the same hardware, at the price of speed.
        eval_every: epochs from one evaluation on held-out images to the next; after the last epoch there is one anyway.
        sync_batchnorm: batch norm sees the whole batch, not each process's part.
    """

    recipe: TrainRecipe
    out: Path
    seed: int
    pad: bool
    amp: Amp
    workers: int | None
    save_every_minutes: float
    on_bad_sample: OnBadSample = "stop"
    keep: int = 3
    resume: Resume = "auto"
    accumulate: int = 1
    compile: bool = False
    deterministic: bool = False
    eval_every: int = 1
    sync_batchnorm: bool = False


@dataclass(frozen=True)
class Caching:
    """Where shards from elsewhere are kept: at most ``size`` bytes of them in ``folder``; None means the default."""

    folder: Path | None
    size: int


@dataclass(frozen=True)
class Pretraining:
    """``fractaltrain pt``. ``window`` is in shards; ``image_size`` None means that of the dataset.

    ``shards`` is a local folder; with ``caching``, a URL. ``changed`` names fields of the recipe that the user has
    set, which do not follow the kind of the dataset. With ``nodes_split`` machines share out the shards of an epoch
    among them.
    """

    running: Running
    changed: frozenset[str]
    shards: str
    caching: Caching | None
    model: str
    image_size: int | None
    window: int
    nodes_split: bool = False


@dataclass(frozen=True)
class Finetuning:
    """``fractaltrain ft``. ``weights`` is the folder of a run; ``timm``: the published ones; None: random ones.

    ``image_size`` None means that of the pre-training, or 224 without. With ``freeze`` only the classifier learns.
    """

    running: Running
    weights: Start
    model: str
    data: DataChoice
    image_size: int | None
    freeze: Freeze | None = None


@dataclass(frozen=True)
class Evaluation:
    """``fractaltrain eval``: a run, images, and where the report goes; None: into the run's folder."""

    run: Path
    data: DataChoice
    out: Path | None
    batch_size: int


def dataset_name(shards: str) -> str:
    """What a dataset is called: the last part of its path or URL."""
    location = parse_location(shards)
    return Path(location.root).resolve().name if location.scheme == "file" else location.root.rpartition("/")[2]


def pretraining_folder(shards: str, model: str, recipe: TrainRecipe) -> Path:
    """``runs/<dataset>-<model>-<recipe>``."""
    return Path("runs") / f"{dataset_name(shards)}-{model}-{recipe.name}"


def finetuning_folder(
    weights: Start, model: str, data: DataChoice, recipe: TrainRecipe, freeze: Freeze | None = None
) -> Path:
    """``runs/<data>-<what it starts from>-<recipe>``, with the subset and what is frozen where there is such."""
    subset = "" if data.per_class is None else f"-{data.per_class}-per-class-{data.subset_seed}"
    if isinstance(weights, Path):
        start = f"from-{weights.resolve().name}"
    else:
        start = model if weights is None else f"from-{weights}-{model}"
    frozen = f"-{freeze}-frozen" if freeze else ""
    return Path("runs") / f"{data.label}{subset}-{start}-{recipe.name}{frozen}"
