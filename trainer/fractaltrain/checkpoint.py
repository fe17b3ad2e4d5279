"""Checkpoints: everything a run needs to continue, written atomically, read without running code."""

import errno
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fractalshards.atomic import atomic_file
from fractalshards.errors import FractalError
from fractalshards.human import one_line

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
