"""Checkpoints: everything a run needs to continue, written atomically, read without running code."""

import errno
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError
from fractalshards.fields import Fields
from fractalshards.human import human_count, one_line
from fractalshards.settings import override
from fractalshards.storage import atomic_file
from fractaltrain.models import create_model
from fractaltrain.recipes.recipe import TrainRecipe
from fractaltrain.run_folder import RUN, settings_of

_FORMAT = 2
_NAME = re.compile(r"checkpoint-(\d+)-(\d+)\.pt")
_FILE_SYSTEM = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOENT)


@dataclass(frozen=True)
class Position:
    """How far a run is: ``step`` optimiser steps of ``epoch`` are done, both counted from 0.

    ``loss_sum`` adds up the losses of this epoch's global batches so far, ``logged_sum`` those up to the last line of
    the metrics; ``bad_samples`` of this epoch were replaced so far. ``history`` has, for every finished epoch, its
    ``train_loss``, and the scores of its evaluation if there was one.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    logged_sum: float = 0.0
    bad_samples: int = 0
    history: tuple[dict[str, float], ...] = ()


class Checkpoint(NamedTuple):
    """What a checkpoint holds, and what is wrong with newer ones that were passed over, a line each.

    ``state`` are state dicts by name, on the CPU: ``model``, ``optimizer``, ``schedule``, ``scaler``, perhaps ``ema``;
    and ``settings`` as ``run.json`` has them.
    """

    path: Path
    position: Position
    state: dict[str, Any]
    passed_over: tuple[str, ...]


def checkpoint_path(folder: Path, position: Position) -> Path:
    """``folder/checkpoint-EPOCH-STEP.pt``: so many epochs are finished, and so many steps of the next."""
    return folder / f"checkpoint-{position.epoch:04d}-{position.step:07d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """All checkpoints of a run, the oldest first; none of another name counts."""
    found = [(name, path) for path in folder.glob("checkpoint-*.pt") if (name := _NAME.fullmatch(path.name))]
    return [path for *_, path in sorted((int(name[1]), int(name[2]), path) for name, path in found)]


def save_checkpoint(folder: Path, position: Position, state: Mapping[str, Any], keep: int) -> None:
    """Write a checkpoint, then remove all but the last ``keep``; a reader sees it whole or not at all.

    A checkpoint of a later position goes, too: the run could not read it, or would have continued from there.

    Args:
        state: state dicts by name, see ``Checkpoint``.

    Raises:
        OSError: as the file system does (full disk); then the old ones are still there.
    """
    path = checkpoint_path(folder, position)
    with atomic_file(path) as file:
        try:
            torch.save({"format": _FORMAT, "position": asdict(position), **state}, file)
        except RuntimeError as error:  # torch hides what came in the way: the file system, or Ctrl-C
            cause = error.__context__
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            if isinstance(cause, KeyboardInterrupt):
                raise cause from error
            raise
    paths = list_checkpoints(folder)
    place = paths.index(path) + 1
    for old in {*paths} - {*paths[max(place - keep, 0) : place]}:
        old.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is sound; None if there is none at all.

    Raises:
        FractalError: if there are checkpoints, but none that is sound, or one is of another format.
        OSError: if one cannot be read; it may be sound.
    """
    passed_over: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            with warnings.catch_warnings(action="ignore"):
                state = torch.load(path, map_location="cpu", weights_only=True)
            if state["format"] != _FORMAT:
                raise FractalError(f"{path}: written by another version; choose another folder with --out")
            position = Position(**state["position"])
            parts = {name: part for name, part in state.items() if name not in ("format", "position")}
            return Checkpoint(path, position, parts, tuple(passed_over))
        except FractalError:
            raise
        except Exception as error:  # any kind, as torch meets the bytes of a damaged file
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # a sound one may be too large
                raise FractalError(f"{path}: no memory to load it; free some, or remove it if it is damaged") from error
            if isinstance(error, OSError) and error.errno in _FILE_SYSTEM:
                raise
            passed_over.append(f"{path}: damaged ({_reason(error)})")
    if passed_over:
        older = len(passed_over) - 1
        others = (f", and so are {older} older ones" if older > 1 else ", and so is the older one") if older else ""
        raise FractalError(f"{passed_over[0]}{others}; remove {folder} to start again")
    return None


def model_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """State dict of the model that was evaluated: of the averaged one, where there is one."""
    state: dict[str, torch.Tensor] = checkpoint.state.get("ema", checkpoint.state["model"])
    return state


def restore(checkpoint: Checkpoint, parts: Mapping[str, Any]) -> None:
    """Load each state dict into the part of its name.

    Raises:
        FractalError: if they do not fit: the checkpoint is that of another run.
    """
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint.state[name])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FractalError(
            f"{checkpoint.path}: of another run or model ({_reason(error)}); remove it, or choose another folder "
            "with --out"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of what torch says, which goes on for many."""
    if isinstance(error, KeyError):
        return f"no {error}"
    first = str(error).strip().splitlines()[:1]
    return one_line(first[0]).rstrip(".:") if first else type(error).__name__


@dataclass(frozen=True)
class Trained:
    """A run of pre-training or fine-tuning.

    Attributes:
        classes: outputs of its classifier.
        class_names: of what it was fine-tuned on, by class index; empty where nobody knows.
        data: ``--data`` of a fine-tuning, None of a pre-training.
        per_class: training images of every class that ``subset_seed`` chose; None: all.
        recipe: with all overrides applied.
        precision: of the forward pass.
        position: how far training had come.
        weights: state dict of its model, on the CPU.
        sha256: of the checkpoint that they are from.
        passed_over: what is wrong with newer checkpoints, a line each.
    """

    folder: Path
    model: str
    classes: int
    image_size: int
    class_names: tuple[str, ...]
    data: str | None
    per_class: int | None
    subset_seed: int
    recipe: TrainRecipe
    precision: torch.dtype
    position: Position
    weights: Mapping[str, torch.Tensor]
    sha256: str
    passed_over: tuple[str, ...]

    def origin(self) -> str:
        """Where its weights are from, for people."""
        return describe_origin(self.folder, self.position, self.passed_over)

    def rebuilt(self) -> nn.Module:
        """Its model with its weights.

        Raises:
            FractalError: if they do not fit the model that ``run.json`` names.
        """
        model = create_model(self.model, self.classes, self.image_size)
        try:
            model.load_state_dict(dict(self.weights))
        except RuntimeError as error:
            raise FractalError(
                f"{self.folder}: its checkpoint holds weights of another model than {self.model} with {self.classes} "
                f"classes, which its {RUN} names; check the folder"
            ) from error
        return model


def load_trained(folder: Path) -> Trained:
    """Read a run.

    Raises:
        FractalError: if the folder holds no run, or none with a sound checkpoint, or ``run.json`` is damaged.
    """
    settings = settings_of(folder)
    path = folder / RUN
    classes = settings.count("classes")
    names = settings.texts("class_names") if "class_names" in settings else ()
    if len(names) not in (0, classes):
        raise FractalError(f"{path}: {len(names)} class_names for {classes} classes; train it again")
    checkpoint = sound_checkpoint(folder)
    return Trained(
        folder=folder,
        model=settings.text("model"),
        classes=classes,
        image_size=settings.count("image_size"),
        class_names=names,
        data=settings.text("data") if "data" in settings else None,
        per_class=_count_or_none(settings, "per_class"),
        subset_seed=_count_or_none(settings, "subset_seed") or 0,
        recipe=_read_recipe(settings.mapping("recipe"), path),
        precision=_read_precision(settings.text("precision"), path),
        position=checkpoint.position,
        weights=model_weights(checkpoint),
        sha256=sha256_file(checkpoint.path),
        passed_over=checkpoint.passed_over,
    )


def describe_origin(folder: Path, position: Position, passed_over: Sequence[str]) -> str:
    """Where weights are from, for people: how far the run had come, after what is wrong with newer checkpoints."""
    passed = "".join(f"{problem}; taking the one before\n" for problem in passed_over)
    begun = f" and {human_count(position.step, 'step')} of the next" if position.step else ""
    return f"{passed}weights of {folder} after {human_count(position.epoch, 'epoch')}{begun}"


def sound_checkpoint(folder: Path) -> Checkpoint:
    """The newest sound checkpoint of a run.

    Raises:
        FractalError: if there is none.
    """
    checkpoint = load_checkpoint(folder)
    if checkpoint is None:
        raise FractalError(f"{folder}: no checkpoint yet; let its training save one first")
    return checkpoint


def _count_or_none(settings: Fields, name: str) -> int | None:
    return settings.count(name) if name in settings and not settings.is_null(name) else None


def _read_recipe(figures: Mapping[str, Any], path: Path) -> TrainRecipe:
    """The recipe of ``run.json``; figures that this version does not know are passed over."""
    known = {field.name for field in fields(TrainRecipe)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in figures.items() if name in known
    }
    try:
        recipe = TrainRecipe(**values)
        return override(recipe, {name: value for name, value in values.items() if name != "name"})  # checks their types
    except (TypeError, ValueError, FractalError) as error:
        raise FractalError(f"{path}: its recipe cannot be read ({one_line(str(error))}); train it again") from error


def _read_precision(name: str, path: Path) -> torch.dtype:
    known = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    if name not in known:
        raise FractalError(f"{path}: precision {name} is none of {', '.join(known)}; train it again")
    return known[name]
