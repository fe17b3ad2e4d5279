"""Checkpoints: everything a run needs to continue, written atomically, read without running code."""

import errno
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fractalshards.atomic import atomic_file
from fractalshards.errors import FractalError

FILE = "checkpoint.pt"
_FORMAT = 1
_FILE_SYSTEM = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOENT)


@dataclass(frozen=True)
class Position:
    """How far a run is: ``step`` optimiser steps of ``epoch`` are done, both counted from 0.

    ``loss_sum`` adds up the losses of this epoch's global batches so far; ``history`` has, for every finished epoch,
    its ``train_loss`` and the scores of the evaluation after it.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    history: tuple[dict[str, float], ...] = ()


def save_checkpoint(folder: Path, position: Position, state: dict[str, Any]) -> None:
    """Write ``folder/checkpoint.pt``; a reader sees the old one or the new one, never a part.

    Args:
        state: state dicts by name: ``model``, ``optimizer``, ``schedule``, ``scaler``.

    Raises:
        OSError: as the file system does (full disk); then the old one is still there.
    """
    path = folder / FILE
    with atomic_file(path) as file:
        try:
            torch.save({"format": _FORMAT, "position": asdict(position), **state}, file)
        except RuntimeError as error:  # torch hides what the file system said
            cause = error.__context__
            if isinstance(cause, OSError):
                raise OSError(cause.errno, cause.strerror, str(path)) from error
            raise


def load_checkpoint(folder: Path) -> tuple[Position, dict[str, Any]] | None:
    """What ``save_checkpoint`` was given, on the CPU; None if there is no checkpoint.

    Raises:
        FractalError: if the file is damaged or of another format.
        OSError: if it cannot be read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state.pop("format") != _FORMAT:
            raise FractalError(f"{path}: written by another version; choose another folder with --out")
        return Position(**state.pop("position")), state
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        if isinstance(error, OSError) and error.errno in _FILE_SYSTEM:
            raise  # the file may be sound
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FractalError(f"{path}: damaged ({reason}); remove it to start again") from error
