"""Run a study: each run is a command line ``python -m fractaltrain``, in a process of its own, unless it is done."""

import logging
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError, StoppedError, UsageError, needs_extra
from fractalshards.human import human_count
from fractalshards.manifest import find_manifest, load_manifest
from fractalshards.remote.stores import parse_location
from fractalshards.workers import STOP_SIGNALS, available_cores, handling
from fractaltrain.config import EXIT_STOPPED
from fractaltrain.data.images import find_data
from fractaltrain.run_folder import RESULT, RUN, flatten, read_settings
from fractaltrain.study import Study, StudyPlan, StudyRun

_log = logging.getLogger(__name__)

LOGS = "log"
"""Folder for the output of runs that run at the same time."""

_POLL_SECONDS = 0.1
_INTERRUPT_SECONDS = 5.0


def find_digests(study: Study) -> dict[str, str]:
    """Return the content digests of all finished datasets on this machine, by location."""
    digests = {}
    for shards in study.shards():
        location = parse_location(shards)
        if location.scheme == "file":
            with suppress(FractalError, OSError):  # missing ones have an error of their own
                digests[shards] = load_manifest(Path(location.root)).content_digest()
    return digests


def missing_datasets(study: Study) -> Iterator[str]:
    """Yield an error for each dataset and image folder that should be on this machine and is not."""
    for row, dataset in study.pretraining.items():
        location = parse_location(dataset.shards)
        if location.scheme == "file":
            try:
                find_manifest(Path(location.root))
            except FractalError as error:
                build = f"{dataset.shards}: no finished dataset; run {dataset.build}"
                yield f"[pretraining.{row}] {build if dataset.build else error}"
    for target in study.finetuning:
        try:
            find_data(study.data(target))
        except FractalError as error:
            yield f"[finetuning.{target}] {error}"


def check_models(plan: StudyPlan, image_size: int) -> None:
    """Build every model with every drop path of its recipes, on the meta device: it needs no memory.

    Raises:
        UsageError: if a model does not exist, or does not fit a recipe or the image size.
    """
    with needs_extra("train", "a study"):
        import torch

        from fractaltrain.models import create_model
    runs = (*plan.pretrainings, *plan.finetunings)
    for model, drop_path in dict.fromkeys((run.model, run.settings["recipe"]["drop_path"]) for run in runs):
        try:
            with torch.device("meta"):
                create_model(model, classes=2, image_size=image_size, drop_path=drop_path)
        except FractalError as error:
            raise UsageError(f"[models.{model}] {error}") from error


def is_done(run: StudyRun, folder: Path) -> bool:
    """Return whether a run has finished, whatever its settings."""
    return (folder / run.run / RESULT).exists() and (folder / run.run / RUN).exists()


def why_unusable(run: StudyRun, plan: StudyPlan, folder: Path) -> str | None:
    """Return why what is in a run's folder cannot be used; None: it can, or there is nothing yet.

    Settings, content digests of datasets, and the sha256 of the weights that a fine-tuning started from must be those
    that the study asks for.

    Raises:
        FractalError: if its ``run.json`` is damaged.
    """
    if not (folder / run.run / RUN).exists():
        return None
    found, wanted = read_settings(folder / run.run), flatten(run.settings)
    for field in wanted:
        if found.get(field) != wanted[field]:
            if field in ("dataset_digest", "data_digest"):
                return "its dataset was built again with other content; remove this run, or choose another --out"
            return f"has {field} {found.get(field)}, not {wanted[field]}; remove this run, or choose another --out"
    if run.start is None:
        return None
    if why_unusable(plan.starts[run.start], plan, folder):
        return f"starts from {run.start}, which is not usable; remove this run, too"
    from fractaltrain.checkpoint import list_checkpoints  # imports torch

    checkpoints = list_checkpoints(folder / run.start)[::-1]
    if checkpoints and all(_sha256(path, path.stat().st_mtime_ns) != found.get("weights") for path in checkpoints):
        return f"started from other weights than {run.start} has now; remove this run"
    return None


@cache
def _sha256(path: Path, mtime_ns: int) -> str:
    """Return the sha256 of a file; cached, since many fine-tunings start from one pre-training."""
    return sha256_file(path)


def describe_study(runs: Iterable[StudyRun], plan: StudyPlan, folder: Path, data_dir: Path) -> Iterator[str]:
    """Yield each run with its state and command line, then a line with the totals."""
    states = []
    for run in runs:
        problem = why_unusable(run, plan, folder)
        states.append("not usable" if problem else "done" if is_done(run, folder) else "to do")
        yield f"# {run.run}: {states[-1]}" + (f": {problem}" if problem else "")
        yield f"fractaltrain {shlex.join(run.command(folder, data_dir))}"
    totals = ", ".join(f"{count} {state}" for state, count in Counter(states).items())
    yield f"{human_count(len(states), 'run')}: {totals}"


def run_study(
    runs: Sequence[StudyRun],
    plan: StudyPlan,
    folder: Path,
    data_dir: Path,
    nproc: int | None = None,
    jobs: int = 1,
    quiet: bool = False,
) -> list[str]:
    """Run all ``runs`` that are not done.

    A failure stops only the runs that need its result. SIGTERM and SIGUSR1 are passed on to the processes, which save.

    Args:
        runs: part of the plan, or all of it; a pre-training comes before its fine-tunings.
        folder: folder of the study.
        data_dir: folder of CIFAR's archives.
        nproc: training processes of each run; None: one per GPU.
        jobs: number of runs at the same time. If there are several, their output goes into the study's folder.
        quiet: pass ``--quiet`` on.

    Returns:
        The runs that are missing, since they failed, are not usable, or start from such a run.

    Raises:
        StoppedError: if the study or a run was stopped.
    """
    options = (*(("--nproc", str(nproc)) if nproc else ()), *(("--quiet",) if quiet else ()))
    threads = max(available_cores() // (jobs * (nproc or 1)), 1) if jobs > 1 else None
    waiting = list(runs)
    done: dict[str, bool] = {}  # by run: whether its result can be used
    running: dict[str, subprocess.Popen[bytes]] = {}
    received: list[int] = []  # signals; nothing starts after the first
    forwarded = False
    try:
        with handling(lambda number, frame: received.append(number), *STOP_SIGNALS):
            while running or (waiting and not received):
                run = None if received or len(running) == jobs else _next(waiting, done)
                if run:
                    waiting.remove(run)
                    state = _state(run, plan, folder, done)
                    if state is None:
                        log = folder / LOGS / f"{run.run}.txt" if jobs > 1 else None
                        running[run.run] = _start((*run.command(folder, data_dir), *options), log, threads)
                    else:
                        done[run.run] = state
                    continue
                time.sleep(_POLL_SECONDS)
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    code = running.pop(name).returncode
                    done[name] = code == 0
                    if code == EXIT_STOPPED:
                        received.append(STOP_SIGNALS[0])
                    elif code and not received:
                        _log.error("%s: failed with exit code %d; continuing with other runs", folder / name, code)
                if received and not forwarded:
                    forwarded = True
                    for process in running.values():
                        process.send_signal(received[0])
    except KeyboardInterrupt as error:
        raise StoppedError(f"{folder}: stopped by Ctrl-C; run the same command to continue", 130) from error
    finally:
        for process in running.values():  # Ctrl-C at a terminal reaches them as well
            with suppress(subprocess.TimeoutExpired):
                process.wait(_INTERRUPT_SECONDS)
            process.terminate()
            process.wait()
    if received:
        raise StoppedError(f"{folder}: stopped; run the same command to continue", EXIT_STOPPED)
    return [run.run for run in runs if not done[run.run]]


def _next(waiting: Sequence[StudyRun], done: Mapping[str, bool]) -> StudyRun | None:
    """Return the first run whose pre-training, if any, has been tried."""
    return next((run for run in waiting if run.start is None or run.start in done), None)


def _state(run: StudyRun, plan: StudyPlan, folder: Path, done: Mapping[str, bool]) -> bool | None:
    """Return whether the result of a run can be used; None: it has to run first."""
    if run.start and not done[run.start]:
        return False
    if problem := why_unusable(run, plan, folder):
        _log.error("%s: %s", folder / run.run, problem)
        return False
    return True if is_done(run, folder) else None


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "fractaltrain", *arguments]


def _start(arguments: Sequence[str], log: Path | None, threads: int | None) -> "subprocess.Popen[bytes]":
    """Start a command; ``log`` takes its output, ``threads`` is the default of OMP_NUM_THREADS."""
    _log.info("fractaltrain %s", shlex.join(arguments))
    environment = ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | os.environ
    if log is None:
        return subprocess.Popen(_command(arguments), env=environment)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(_command(arguments), stdout=file, env=environment)
