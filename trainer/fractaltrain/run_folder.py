"""The folder of a run: ``run.json`` holds its settings; ``result.json`` exists once it has finished."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from fractalshards.errors import FractalError, UsageError
from fractalshards.storage import read_json, remove_leftovers, write_json
from fractaltrain.config import Resume
from fractaltrain.recipes.recipe import TrainRecipe

RUN, RESULT = "run.json", "result.json"
_Count = Annotated[int, msgspec.Meta(ge=1)]


@dataclass(frozen=True)
class RunSettings:
    """The settings in ``run.json`` that are needed to use a trained run.

    Attributes:
        model: name of the model.
        classes: outputs of its classifier.
        image_size: side in pixels of the square images it takes.
        precision: torch's name of the precision of the forward pass.
        class_names: class names by index; empty if unknown.
        data: ``--data`` of a fine-tuning; None for a pre-training.
        per_class: training images per class that ``subset_seed`` drew; None: all.
    """

    model: str
    classes: _Count
    image_size: _Count
    recipe: TrainRecipe
    precision: Literal["torch.float32", "torch.bfloat16", "torch.float16"]
    class_names: tuple[str, ...] = ()
    data: str | None = None
    per_class: int | None = None
    subset_seed: int | None = None


@dataclass(frozen=True)
class _RunFile:
    settings: RunSettings


@dataclass(frozen=True)
class _RunFileAsIs:
    settings: dict[str, Any]


def open_run(folder: Path, settings: Mapping[str, Any], environment: Mapping[str, Any], resume: Resume) -> None:
    """Create the folder and its ``run.json``, or check that it holds the same run.

    Args:
        settings: everything that determines the result of the run, and nothing else (JSON-like).
        environment: recorded, but not compared (JSON-like).

    Raises:
        FractalError: if the folder holds a run with other settings, or ``resume`` forbids what is there.
        OSError: if it cannot be written.
    """
    exists = (folder / RUN).exists()
    if exists and resume == "never":
        raise FractalError(f"{folder}: already holds a run; choose another folder with --out, or drop --resume never")
    if not exists and resume == "must":
        raise FractalError(f"{folder}: no run to continue; check --out, or drop --resume must")
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if not exists:
        write_json(folder / RUN, {"settings": settings, "environment": environment}, indent=1)
        return
    found, wanted = read_settings(folder), flatten(settings)
    differing = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if differing:
        name = differing[0]
        more = f" (and {len(differing) - 1} more)" if differing[1:] else ""
        raise FractalError(
            f"{folder}: holds a run with {name} {found.get(name)}, not {wanted.get(name)}{more}; "
            "choose another folder with --out, or remove this one"
        )


def read_settings(folder: Path) -> dict[str, Any]:
    """Return all settings of a run, nested names joined by dots.

    Raises:
        FractalError: if the folder holds no run, or its ``run.json`` is damaged.
    """
    return flatten(read_json(_run_file(folder), _RunFileAsIs).settings)


def load_settings(folder: Path) -> RunSettings:
    """Return the settings that are needed to use a trained run.

    Raises:
        FractalError: if the folder holds no run, or its ``run.json`` is damaged.
    """
    try:
        settings = read_json(_run_file(folder), _RunFile).settings
    except UsageError as error:  # a value that no recipe can have
        raise FractalError(f"{folder / RUN}: {error}") from error
    if len(settings.class_names) not in (0, settings.classes):
        raise FractalError(f"{folder / RUN}: {len(settings.class_names)} class_names for {settings.classes} classes")
    return settings


def _run_file(folder: Path) -> Path:
    path = folder / RUN
    if not path.is_file():
        raise FractalError(f"{folder}: has no {RUN}, so it is not the folder of a run; check the path")
    return path


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn ``{"recipe": {"lr": 1}}`` into ``{"recipe.lr": 1}``, and tuples into lists as JSON does."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(settings)).items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
