"""Checkpoints: everything that a run needs to continue, written atomically and loaded without executing code."""

import errno
import platform
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError
from fractalshards.human import human_count
from fractalshards.storage import atomic_file
from fractaltrain.config import RunConfig
from fractaltrain.distributed import World
from fractaltrain.models import create_model, reason
from fractaltrain.run_folder import RunSettings, list_checkpoints, load_settings, open_run

_FORMAT = 3
_FORMATS_WITH_WEIGHTS = (2, 3)  # 2: written by version 0.1; such runs cannot be continued
_FILE_SYSTEM = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOENT)


@dataclass(frozen=True)
class Position:
    """Progress of a run."""

    epoch: int = 0  # finished epochs
    step: int = 0  # optimiser steps done in the current epoch
    loss_sum: float = 0.0  # sum of the losses of these steps
    logged_sum: float = 0.0  # ``loss_sum`` at the last log entry
    bad_samples: int = 0  # unreadable samples of this epoch, which were replaced
    history: tuple[dict[str, float], ...] = ()  # ``train_loss`` of every finished epoch, and scores if it was evaluated

    def __str__(self) -> str:
        return f"epoch {self.epoch + 1}, step {self.step}"


class Checkpoint(NamedTuple):
    """The contents of a checkpoint."""

    path: Path
    position: Position
    state: dict[str, Any]  # state dicts on the CPU: model, optimizer, schedule, scaler, and ema if weights are averaged
    skipped: tuple[str, ...]  # a message for every newer checkpoint; they are damaged

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The weights to evaluate and fine-tune: averaged ones if there are any, else those of the model."""
        return self.state.get("ema", self.state["model"])  # type: ignore[no-any-return]


def checkpoint_path(folder: Path, position: Position) -> Path:
    """Return ``folder/checkpoint-EPOCH-STEP.pt``."""
    return folder / f"checkpoint-{position.epoch:04d}-{position.step:07d}.pt"


def save_checkpoint(run: RunConfig, position: Position, parts: Mapping[str, Any], world: World) -> None:
    """Write a checkpoint of ``parts``, everything with a ``state_dict``, on rank 0; then keep the newest ``run.keep``.

    Older checkpoints are removed, and damaged later ones; none if the new one cannot be written.
    """
    if not world.main:
        return
    path = checkpoint_path(run.out, position)
    state = {name: part.state_dict() for name, part in parts.items()}
    with atomic_file(path) as file:
        try:
            torch.save({"format": _FORMAT, "position": asdict(position), **state}, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError | KeyboardInterrupt):  # a full disk or Ctrl-C, which torch hides
                raise error.__context__ from error
            raise
    paths = list_checkpoints(run.out)
    end = paths.index(path) + 1
    for old in {*paths} - {*paths[max(end - run.keep, 0) : end]}:
        old.unlink(missing_ok=True)


def load_checkpoint(folder: Path, to_continue: bool = False) -> Checkpoint | None:
    """Load the newest checkpoint that is not damaged; return None if there are no checkpoints.

    Raises FractalError if all are damaged, or the newest one was written by another version; with ``to_continue``, also
    by version 0.1, whose weights alone can be used.
    """
    skipped: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            with warnings.catch_warnings(action="ignore"):
                state = torch.load(path, map_location="cpu", weights_only=True)
            file_format, position = state.pop("format"), Position(**state.pop("position"))
        except Exception as error:  # a damaged file makes torch raise errors of any type
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # it may be undamaged
                raise FractalError(f"{path}: not enough memory to load it") from error
            if isinstance(error, OSError) and error.errno in _FILE_SYSTEM:
                raise
            what = reason(error).partition(". ")[0]  # torch goes on with advice to load files that are not trusted
            skipped.append(f"{path}: damaged ({what})")
            continue
        if file_format not in ((_FORMAT,) if to_continue else _FORMATS_WITH_WEIGHTS):
            raise FractalError(f"{path}: written by another version; choose another folder with --out")
        return Checkpoint(path, position, state, tuple(skipped))
    if skipped:
        more = f" (and {human_count(len(skipped) - 1, 'older one')})" if skipped[1:] else ""
        raise FractalError(f"{skipped[0]}{more}; remove {folder} to start over")
    return None


@contextmanager
def resume(
    run: RunConfig, settings: Mapping[str, Any], parts: Mapping[str, Any], world: World
) -> Iterator[tuple[Position, Sequence[str]]]:
    """Hold the folder of a run, and load its newest checkpoint, if it has one, into ``parts``. Collective.

    Yields the position to continue from, and messages for the user. Raises FractalError as ``run_folder.open_run`` and
    ``load_checkpoint`` do, or if the checkpoint does not fit.
    """
    with open_run(run.out, settings, _environment(run, world), run.resume) if world.main else nullcontext(()) as moved:
        checkpoint = world.share(load_checkpoint(run.out, to_continue=True) if world.main else None)
        if checkpoint is None:
            yield Position(), moved
            return
        restore(checkpoint, parts)
        position = checkpoint.position
        finished = position.epoch >= settings["recipe"]["epochs"]
        message = "was already finished" if finished else f"continuing at {position}"
        skipped = [f"{problem}; using the one before" for problem in checkpoint.skipped]
        yield position, (*moved, *skipped, f"{run.out}: {message}")


def _environment(run: RunConfig, world: World) -> dict[str, Any]:
    """Return options, device and versions to record in ``run.json``; they may change when a run continues."""
    return {
        "processes": world.size,
        "accumulate": run.accumulate,
        "compile": run.compile,
        "deterministic": run.deterministic,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "timm")},
    }


def restore(checkpoint: Checkpoint, parts: Mapping[str, Any]) -> None:
    """Load the state dicts into the parts with the same names; raises FractalError if they do not fit."""
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint.state[name])
            if isinstance(part, torch.optim.Optimizer):
                _lay_out_as_parameters(part)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FractalError(f"{checkpoint.path}: is of another run ({reason(error)}); choose another --out") from error


def _lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimiser's tensors the memory layout of their parameters, which its fused updates rely on.

    Those of a convolutional network are channels last if a GPU saved them, and contiguous if a CPU did.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


@dataclass(frozen=True)
class TrainedRun:
    """A run with its newest undamaged checkpoint."""

    folder: Path
    settings: RunSettings
    checkpoint: Checkpoint
    sha256: str  # hash of the checkpoint file

    @property
    def precision(self) -> torch.dtype:
        """Precision of the forward pass."""
        dtype: torch.dtype = getattr(torch, self.settings.precision.removeprefix("torch."))
        return dtype

    @property
    def origin(self) -> str:
        """A line that says where the weights come from, after a line for each checkpoint that was skipped."""
        skipped = "".join(f"{problem}; using the one before\n" for problem in self.checkpoint.skipped)
        position = self.checkpoint.position
        steps = f" and {human_count(position.step, 'step')} of the next" if position.step else ""
        return f"{skipped}weights of {self.folder} after {human_count(position.epoch, 'epoch')}{steps}"

    def build_model(self) -> nn.Module:
        """Return the model with its weights; raises FractalError if they do not fit ``run.json``."""
        name, classes = self.settings.model, self.settings.classes
        model = create_model(name, classes, self.settings.image_size, arguments=self.settings.model_args)
        try:
            model.load_state_dict(self.checkpoint.weights)
        except RuntimeError as error:
            raise FractalError(f"{self.folder}: its checkpoint does not fit {name} with {classes} classes") from error
        return model


def load_run(folder: Path) -> TrainedRun:
    """Load the newest weights of a run; raises FractalError if there are none, or ``run.json`` is damaged."""
    settings = load_settings(folder)
    checkpoint = load_checkpoint(folder)
    if checkpoint is None:
        raise FractalError(f"{folder}: has no checkpoint yet; let its training save one first")
    return TrainedRun(folder, settings, checkpoint, sha256_file(checkpoint.path))
