"""The folder of a run: ``run.json`` holds its settings; ``result.json`` exists once it has finished.

One process at a time works in the folder of a run or study: the one that holds the lock on the file ``.lock``.
"""

import errno
import fcntl
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from fractalshards.errors import FractalError, UsageError
from fractalshards.human import one_line
from fractalshards.storage import read_json, remove_leftovers, write_json
from fractaltrain.config import ModelArgument, Resume
from fractaltrain.recipes.recipe import TrainRecipe

RUN, METRICS, RESULT, LOCK = "run.json", "metrics.jsonl", "result.json", ".lock"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)-(\d+)\.pt")
_CONTENT = {  # settings that may differ if the digest of the content is the same
    "dataset": "dataset_digest",
    "dataset_recipe": "dataset_digest",
    "data": "data_digest",
    "pretraining": "weights",
}
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_MAX_HOLDER_BYTES = 400

_log = logging.getLogger(__name__)
_Count = Annotated[int, msgspec.Meta(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Training:
    """The settings in ``run.json`` that say what a run was trained on, and how."""

    recipe: TrainRecipe
    dataset: str | None = None  # name of the dataset of a pre-training
    dataset_digest: str | None = None
    dataset_recipe: dict[str, Any] = field(default_factory=dict)  # empty if unknown
    fresh: bool = False  # whether every epoch showed new images
    data: str | None = None  # ``--data`` of a fine-tuning; None for a pre-training
    weights: str | None = None  # at the start: sha256 of the checkpoint, or the name of timm's weights
    pretraining: "Training | None" = None  # how the run with this checkpoint was trained


@dataclass(frozen=True, kw_only=True)
class RunSettings(Training):
    """The settings in ``run.json`` that are needed to use a trained run."""

    model: str
    classes: _Count
    image_size: _Count  # side in pixels of the square images it takes
    precision: Literal["torch.float32", "torch.bfloat16", "torch.float16"]  # precision of the forward pass
    model_args: dict[str, ModelArgument] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()  # by index; empty if unknown
    per_class: int | None = None  # training images per class, drawn by ``subset_seed``; None: all
    subset_seed: int | None = None
    data_digest: str | None = None  # identifies ``data``
    seed: int = 0


@dataclass(frozen=True)
class _RunFile:
    settings: RunSettings


@contextmanager
def hold_folder(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Create a folder and keep other processes from working in it while the block runs, by a lock on its file ``name``.

    Raises FractalError with host and process of another holder. The kernel releases the lock when this process ends;
    the file stays, and names the last holder. On a file system without locks, warns and continues.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a+b", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not shared with forked loader workers
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = one_line(file.read(_MAX_HOLDER_BYTES).decode(errors="replace")) or "another process"
                raise FractalError(
                    f"{folder}: in use by {holder}; let it end first, or choose another folder with --out"
                ) from error
            if error.errno not in _NO_LOCKS:
                raise
            _log.warning("%s: its file system has no locks; do not start a second command in this folder", folder)
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        try:
            file.truncate(0)
            file.write(f"{socket.gethostname()}, process {os.getpid()}, since {since}\n".encode())
            os.fsync(file.fileno())  # other machines read it
        except OSError as error:
            error.filename = str(folder / name)  # a full disk names no file
            raise
        yield


@contextmanager
def open_run(
    folder: Path, settings: Mapping[str, Any], environment: Mapping[str, Any], resume: Resume
) -> Iterator[Sequence[str]]:
    """Hold the folder of a run while the block runs; write its ``run.json``, or check that it holds the same run.

    A run that ended before anything was trained is replaced. Yields a line for every dataset with a new name and the
    same digest. Raises FractalError if the folder is in use or holds a run with other settings, or if ``resume``
    forbids what it holds.

    Args:
        settings: everything that determines the result of the run, and nothing else (JSON-like).
        environment: recorded, but not compared (JSON-like).
    """
    if resume == "must" and not (folder / RUN).exists():
        raise FractalError(f"{folder}: no run to continue; check --out, or drop --resume must")
    with hold_folder(folder):
        begun = is_begun(folder)
        if begun and resume == "never":
            raise FractalError(f"{folder}: already holds a run; choose another --out, or drop --resume never")
        remove_leftovers(folder)
        if not begun:
            write_json(folder / RUN, {"settings": settings, "environment": environment}, indent=1)
            yield ()
            return
        found, wanted = read_settings(folder), flatten(settings)
        if differing := differences(found, dict.fromkeys(found) | wanted):
            name = differing[0]
            more = f" (and {len(differing) - 1} more)" if differing[1:] else ""
            raise FractalError(
                f"{folder}: holds a run with {name} {found.get(name)}, not {wanted.get(name)}{more}; "
                "choose another folder with --out, or remove this one"
            )
        moved = [name for name in _CONTENT if found.get(name) != wanted.get(name)]
        yield [f"{folder}: started with {found[name]}; {wanted[name]} has the same digest" for name in moved]


def is_begun(folder: Path) -> bool:
    """Return whether a folder holds a run that has trained: it has a checkpoint, metrics or a result."""
    if not (folder / RUN).exists():
        return False
    metrics = folder / METRICS  # created empty before the first step
    return bool((folder / RESULT).exists() or list_checkpoints(folder) or (metrics.exists() and metrics.stat().st_size))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = [(name, path) for path in folder.glob("checkpoint-*.pt") if (name := _CHECKPOINT.fullmatch(path.name))]
    return [path for *_, path in sorted((int(name[1]), int(name[2]), path) for name, path in found)]


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the names of the wanted settings that were found with another value, or not at all.

    A dataset with the same digest is the same, whatever its name or path.
    """
    same = {digest for digest in _CONTENT.values() if found.get(digest) and found[digest] == wanted.get(digest)}
    changed = (name for name in wanted if found.get(name) != wanted[name])
    return [name for name in changed if _CONTENT.get(name.partition(".")[0]) not in same]


def read_settings(folder: Path) -> dict[str, Any]:
    """Return all settings of a run, nested names joined by dots; raises FractalError as ``load_settings`` does."""
    return flatten(read_json(_run_file(folder), dict[str, dict[str, Any]]).get("settings", {}))


def load_settings(folder: Path) -> RunSettings:
    """Return the settings of a trained run; raises FractalError if the folder holds none, or a damaged ``run.json``."""
    try:
        settings = read_json(_run_file(folder), _RunFile).settings
    except UsageError as error:  # a value that recipes do not allow
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
