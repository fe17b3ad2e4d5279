"""What a study costs: the images that its steps see, and the time this takes at the speed of runs that are there."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from fractalshards.errors import FractalError
from fractalshards.foreign import is_foreign, load_foreign
from fractalshards.manifest import load_manifest
from fractalshards.names import TRAINING
from fractalshards.sharing.urls import parse_location
from fractaltrain.run_folder import RESULT, RUN, read_metrics, read_settings
from fractaltrain.study.config import Study
from fractaltrain.study.plan import Group, Step


@dataclass(frozen=True)
class Size:
    """Of a training set; ``classes`` None: not known without reading all of it."""

    classes: int | None
    samples: int


KNOWN = {"digits": Size(10, 1438), "cifar10": Size(10, 50_000), "cifar100": Size(100, 50_000)}
"""Of the digits, four fifths of every class are for training; see ``data/finetuning.py``."""


@dataclass(frozen=True)
class Cost:
    """Images to be seen, and seconds of training; None: not known."""

    images: int | None
    seconds: float | None


@dataclass(frozen=True)
class Total:
    """Of several costs: the sum of those that are known, and how many are not."""

    steps: int
    images: int
    unknown_images: int
    seconds: float
    unknown_seconds: int

    @classmethod
    def of(cls, costs: Iterable[Cost]) -> "Total":
        """The sum."""
        listed = list(costs)
        images = [cost.images for cost in listed if cost.images is not None]
        seconds = [cost.seconds for cost in listed if cost.seconds is not None]
        return cls(len(listed), sum(images), len(listed) - len(images), sum(seconds), len(listed) - len(seconds))


def step_cost(step: Step, sizes: Mapping[str, Size], speeds: Mapping[str, float]) -> Cost:
    """What a step costs from its start to its end.

    Args:
        sizes: by ``Step.source``, of training sets that are known.
        speeds: images per second, by model.
    """
    size = sizes.get(step.source)
    if size is None or (step.per_class is not None and size.classes is None):
        return Cost(None, None)
    samples = size.samples if step.per_class is None else step.per_class * (size.classes or 0)
    images = samples * int(step.settings["recipe"]["epochs"])
    speed = speeds.get(step.model)
    return Cost(images, images / speed if speed else None)


def find_sizes(study: Study) -> dict[str, Size]:
    """Sizes of all training sets that are known or lie finished on this machine, by the name that steps use."""
    found = {source: _size_of(place) for source, place in study.shards().items()}
    return KNOWN | {source: size for source, size in found.items() if size}


def find_speeds(groups: Sequence[Group], folder: Path, image_size: int) -> dict[str, float]:
    """Images per second by model: the median over all finished runs of a study's folder with images of this size."""
    models = {step.model for group in groups for step in group.steps()}
    found: dict[str, list[float]] = {}
    for result in folder.rglob(RESULT):
        run = result.parent
        try:
            settings = read_settings(run) if (run / RUN).is_file() else {}
            if settings.get("model") in models and settings.get("image_size") == image_size:
                speeds = [line["images_per_s"] for line in read_metrics(run) if line.get("images_per_s")]
                found.setdefault(settings["model"], []).extend(speeds)
        except (FractalError, OSError, ValueError, AttributeError):
            continue  # a damaged run tells no speed; who uses it says what is wrong
    return {model: median(speeds) for model, speeds in found.items() if speeds}


def _size_of(place: str) -> Size | None:
    """Of a dataset of shards on this machine."""
    try:
        location = parse_location(place)
        if location.scheme != "file":
            return None
        folder = Path(location.root)
        if is_foreign(folder):
            info = load_foreign(folder)
            samples = sum(count for _, count in info.splits.get(TRAINING, ()))
            return Size(info.classes, samples) if samples else None
        manifest = load_manifest(folder)
        return Size(manifest.classes, manifest.samples(TRAINING)) if TRAINING in manifest.splits else None
    except (FractalError, OSError):
        return None  # not made yet, or of no use: what runs says so
