"""Configurations of the commands: frozen, and pickled to every process. Imports neither torch nor click.

A training is one ``TrainConfig``; an evaluation is one ``EvalConfig``.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from fractalshards.human import escape_bytes
from fractalshards.image_files import parse_place
from fractalshards.remote.stores import parse_location
from fractalshards.webdataset import DEFAULT_OPTIONS, WebDatasetOptions
from fractaltrain.recipes.recipe import TrainRecipe

EXIT_STOPPED = 75  # exit code of a run that a signal stopped, after it saved a checkpoint (EX_TEMPFAIL)
WINDOW = 16  # shards that are shuffled together
CACHE_SIZE = 20_000_000_000  # bytes of a URL's shards in the cache
MEMORY_SIZE = 8_000_000_000  # most bytes of images kept in memory

DATA_KINDS = ("imagefolder", "shards")  # kinds of paths in ``--data``

Amp = Literal["auto", "bf16", "fp16", "fp32"]
PRECISIONS = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "fp32": "torch.float32"}  # torch's names
Resume = Literal["auto", "never", "must"]
OnBadSample = Literal["stop", "skip"]
Freeze = Literal["backbone"]
ModelArgument = bool | int | float | str | None
Weights = Path | Literal["timm"] | None  # the newest in the folder of a run, timm's published ones, or random ones


@dataclass(frozen=True)
class DatasetConfig:
    """``pt --shards`` or ``pt --render``: the dataset to pre-train on."""

    location: str  # folder or URL of the shards, or the file of a recipe to render
    rendered: bool = False  # whether it is a recipe to render
    fresh: bool = False  # render new images in every epoch
    window: int = WINDOW  # shards that are shuffled together
    nodes_split: bool = False  # give each machine its own share of an epoch's shards
    cache_dir: Path | None = None  # for the shards of a URL, and images in memory; None: the default folder
    cache_size: int = CACHE_SIZE  # most bytes of shards there
    memory_size: int | None = None  # most bytes of decoded images, which are kept in memory; None: they are not kept
    tars: WebDatasetOptions = DEFAULT_OPTIONS  # how to read a folder of another program

    @property
    def is_remote(self) -> bool:
        """Whether the dataset is read through a cache."""
        return not self.rendered and parse_location(self.location).scheme != "file"

    @property
    def path(self) -> Path:
        """The path of a local folder or recipe."""
        return Path(self.location if self.rendered else parse_location(self.location).root)

    @property
    def name(self) -> str:
        """The last part of the path or URL; that of a recipe without its extension."""
        if self.is_remote:
            return Path(parse_location(self.location).root).name
        return escape_bytes(self.path.resolve().stem if self.rendered else self.path.resolve().name)


@dataclass(frozen=True)
class ImagesConfig:
    """``--data``: the real images to train or evaluate on."""

    name: str  # see ``data.images.is_data``
    per_class: int | None  # training images per class; None: all
    subset_seed: int  # seed for choosing these images
    folder: Path  # holds published datasets; missing ones are downloaded
    tars: WebDatasetOptions = DEFAULT_OPTIONS  # how to read shards of another program
    window: ClassVar[int] = WINDOW
    fresh: ClassVar[bool] = False

    @property
    def path(self) -> Path | None:
        """The PATH in ``imagefolder:PATH`` and ``shards:PATH``; None for other names."""
        place = parse_place(self.name, DATA_KINDS)
        return place[1] if place else None

    @property
    def label(self) -> str:
        """A short name for folders and figures: the name, or the last part of the path."""
        return escape_bytes(self.path.resolve().name) if self.path else self.name

    @property
    def shown(self) -> str:
        """The name as files and messages contain it."""
        return escape_bytes(self.name)

    @property
    def identity(self) -> str:
        """A unique file name: ``cifar10``, or ``photos-3f2a91`` with a digest of the path."""
        if self.path is None:
            return self.name
        place = f"{self.name.partition(':')[0]}:{self.path.resolve()}"
        digest = hashlib.sha256(place.encode(errors="surrogateescape")).hexdigest()
        return f"{self.label}-{digest[:6]}"


@dataclass(frozen=True)
class ModelConfig:
    """The model to train. The weights of a run bring their own ``name`` and ``arguments``."""

    name: str  # ``resnet50``, or any timm name
    arguments: tuple[tuple[str, ModelArgument], ...] = ()  # further arguments of ``timm.create_model``
    image_size: int | None = None  # side in pixels of the square images it takes; None: that of the data or weights
    weights: Weights = None
    freeze: Freeze | None = None  # the part that is not trained


@dataclass(frozen=True)
class RunConfig:
    """How a training runs: the options of ``pt`` and ``ft``, which ``--help`` describes."""

    out: Path
    seed: int = 0
    pad: bool = False
    amp: Amp = "auto"
    workers: int | None = None  # loader workers per training process; None: chosen from the number of cores
    on_bad_sample: OnBadSample = "stop"
    save_every_minutes: float = 10.0
    keep: int = 3
    resume: Resume = "auto"
    accumulate: int = 1
    compile: bool = False
    deterministic: bool = False
    eval_every: int = 1
    sync_batchnorm: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """A pre-training (``pt``) or a fine-tuning on real images (``ft``); ``recipe`` has all overrides."""

    data: DatasetConfig | ImagesConfig
    model: ModelConfig
    recipe: TrainRecipe
    run: RunConfig

    def settings(self, precision: str, image_size: int, **facts: Any) -> dict[str, Any]:
        """Return everything that determines the result, for ``run.json``; a run continues only with equal settings.

        Args:
            precision: of the forward pass, as torch names it.
            facts: settings that depend on the opened dataset and weights.
        """
        return {
            **facts,
            "recipe": asdict(self.recipe),
            "image_size": image_size,
            "window": self.data.window,
            "seed": self.run.seed,
            "pad": self.run.pad,
            "precision": precision,
            **({"sync_batchnorm": True} if self.run.sync_batchnorm else {}),
        }


@dataclass(frozen=True)
class EvalConfig:
    """``fractaltrain eval``: the evaluation of a run."""

    run: Path
    data: ImagesConfig
    out: Path | None  # folder of the report; None: one inside the run's folder
    batch_size: int  # images at a time


def finetuning_folder(data: ImagesConfig, model: ModelConfig, recipe: str) -> Path:
    """Return the default folder of a fine-tuning, named after data, subset, weights, recipe and frozen part."""
    subset = "" if data.per_class is None else f"-{data.per_class}-per-class-{data.subset_seed}"
    if isinstance(model.weights, Path):
        start = f"from-{escape_bytes(model.weights.resolve().name)}"
    else:
        start = model.name if model.weights is None else f"from-{model.weights}-{model.name}"
    frozen = f"-{model.freeze}-frozen" if model.freeze else ""
    return Path("runs") / f"{data.label}{subset}-{start}-{recipe}{frozen}"
