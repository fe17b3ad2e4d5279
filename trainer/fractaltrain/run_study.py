"""Run a study: each run that is not done is one command, ``python -m fractaltrain``, in a separate process."""

import ctypes
import logging
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import cache, partial
from pathlib import Path

from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError, StoppedError, UsageError, describe_os_error, needs_extra
from fractalshards.human import human_count
from fractalshards.image_files import parse_place
from fractalshards.manifest import load_manifest
from fractalshards.recipe_file import read_portable
from fractalshards.webdataset import DEFAULT_OPTIONS, find_dataset, is_webdataset
from fractalshards.workers import STOP_SIGNALS, available_cores, handling
from fractaltrain.config import EXIT_STOPPED
from fractaltrain.data.images import find_data
from fractaltrain.run_folder import RESULT, differences, flatten, is_begun, list_checkpoints, read_settings
from fractaltrain.study import Study, StudyPlan, StudyRun

DONE, TO_DO, UNUSABLE = "done", "to do", "not usable"
_COMMAND = (sys.executable, "-m", "fractaltrain")
_POLL_SECONDS = 0.1
_INTERRUPT_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1

_log = logging.getLogger(__name__)


def find_datasets(study: Study) -> tuple[dict[str, str], list[str]]:
    """Find the local datasets, recipes and image folders of a study.

    Returns:
        Their digests for ``plan_study``, and an error for each that is missing or damaged.
    """
    digests, problems = {}, []
    for row, pretraining in study.pretraining.items():
        dataset = pretraining.dataset
        try:
            if dataset.rendered:
                digests[pretraining.shards] = read_portable(dataset.path).digest
            elif not dataset.is_remote and not find_dataset(dataset.path, DEFAULT_OPTIONS):
                digests[pretraining.shards] = load_manifest(dataset.path).content_digest()
        except (FractalError, OSError) as error:
            problem = describe_os_error(error) if isinstance(error, OSError) else str(error)
            if pretraining.build:
                problem = f"{pretraining.shards}: no finished dataset; run {pretraining.build}"
            problems.append(f"[pretraining.{row}] {problem}")
    for target in study.finetuning:
        name = study.data(target)
        try:
            find_data(name, DEFAULT_OPTIONS)
            if (place := parse_place(name, ("shards",))) and not is_webdataset(place[1]):
                digests[name] = load_manifest(place[1]).content_digest()
        except (FractalError, OSError) as error:
            problem = describe_os_error(error) if isinstance(error, OSError) else str(error)
            problems.append(f"[finetuning.{target}] {problem}")
    return digests, problems


def check_models(plan: StudyPlan, image_size: int) -> None:
    """Build every model with every drop path of its recipes, on the meta device, which takes no memory.

    Raises UsageError if a model does not exist, or does not fit a recipe or the image size.
    """
    with needs_extra("train", "a study"):
        import torch

        from fractaltrain.models import create_model
    runs = (*plan.pretrainings, *plan.finetunings)
    settings = {(run.model, run.settings["recipe"]["drop_path"]): run.settings for run in runs}
    for (model, drop_path), one in settings.items():
        try:
            with torch.device("meta"):
                create_model(one["model"], 2, image_size, drop_path, one.get("model_args", {}))
        except FractalError as error:
            raise UsageError(f"[models.{model}] {error}") from error


def find_state(run: StudyRun, plan: StudyPlan, folder: Path) -> str:
    """Return ``DONE``, ``TO_DO``, or ``UNUSABLE`` with the reason.

    Settings, content digests of datasets, and the sha256 of the weights that a fine-tuning started from must match the
    study. Raises FractalError if ``run.json`` is damaged.
    """
    path = folder / run.run
    if not is_begun(path):
        return TO_DO
    found, wanted = read_settings(path), flatten(run.settings)
    wanted = {name: None for name in found if name.startswith("model_args.")} | wanted
    for name in differences(found, wanted):
        return f"{UNUSABLE}: has {name} {found.get(name)}, not {wanted[name]}; remove this run, or change --out"
    if run.start:
        if find_state(plan.starts[run.start], plan, folder).startswith(UNUSABLE):
            return f"{UNUSABLE}: starts from {run.start}, which is not usable; remove this run as well"
        checkpoints = list_checkpoints(folder / run.start)[::-1]
        if checkpoints and all(_sha256(file, file.stat().st_mtime_ns) != found.get("weights") for file in checkpoints):
            return f"{UNUSABLE}: started from weights that {run.start} no longer has; remove this run"
    return DONE if (path / RESULT).exists() else TO_DO


@cache
def _sha256(path: Path, mtime_ns: int) -> str:
    """Return the sha256 of a file, cached: many fine-tunings start from one pre-training."""
    return sha256_file(path)


def describe_study(runs: Iterable[StudyRun], plan: StudyPlan, folder: Path, data_dir: Path) -> Iterator[str]:
    """Yield each run with its state and command line, then a line with the totals."""
    totals: Counter[str] = Counter()
    for run in runs:
        state = find_state(run, plan, folder)
        totals[state.partition(":")[0]] += 1
        yield f"# {run.run}: {state}"
        yield f"fractaltrain {shlex.join(run.command(folder, data_dir))}"
    yield f"{human_count(totals.total(), 'run')}: {', '.join(f'{count} {state}' for state, count in totals.items())}"


def run_study(
    runs: Sequence[StudyRun], plan: StudyPlan, folder: Path, data_dir: Path, nproc: int | None = None, jobs: int = 1,
    quiet: bool = False,
) -> list[str]:  # fmt: skip
    """Run all ``runs`` that are not done.

    A failure stops only the runs that need its result. SIGTERM and SIGUSR1 are forwarded to the runs, which save a
    checkpoint. Raises StoppedError if the study or a run was stopped.

    Args:
        runs: the plan or a part of it, in which every fine-tuning comes with its pre-training.
        nproc: training processes of each run; None: one per GPU.
        jobs: runs at the same time; if there are several, their output goes to files in the study's folder.

    Returns:
        Names of the runs without a result: they failed, are not usable, or start from such a run.
    """
    options = (*(("--nproc", str(nproc)) if nproc else ()), *(("--quiet",) if quiet else ()))
    threads = max(available_cores() // (jobs * (nproc or 1)), 1) if jobs > 1 else None
    waiting = sorted(runs, key=lambda run: jobs > 1 and run.target is not None)  # others run beside pre-trainings
    usable: dict[str, bool] = {}  # by run: whether it ended with a result
    running: dict[str, subprocess.Popen[bytes]] = {}
    received: list[int] = []  # signals; nothing starts after the first
    forwarded = False
    try:
        with handling(lambda number, frame: received.append(number), *STOP_SIGNALS):
            while running or (waiting and not received):
                run = next((run for run in waiting if run.start is None or run.start in usable), None)
                if run and len(running) < jobs and not received:
                    waiting.remove(run)
                    if run.start and not usable[run.start]:
                        usable[run.run] = False
                    elif (state := find_state(run, plan, folder)) == TO_DO:
                        log = folder / "log" / f"{run.run}.txt" if jobs > 1 else None
                        running[run.run] = _start((*run.command(folder, data_dir), *options), log, threads)
                    else:
                        usable[run.run] = state == DONE
                        if state != DONE:
                            _log.error("%s: %s", folder / run.run, state)
                    continue
                time.sleep(_POLL_SECONDS)
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    code = running.pop(name).returncode
                    usable[name] = code == 0
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
    return [run.run for run in runs if not usable[run.run]]


def _start(arguments: Sequence[str], log: Path | None, threads: int | None) -> "subprocess.Popen[bytes]":
    """Start a command that writes to ``log`` and receives SIGTERM if this process is killed."""
    _log.info("fractaltrain %s", shlex.join(arguments))
    environment = ({"OMP_NUM_THREADS": str(threads)} if threads else {}) | os.environ
    end_with_parent = partial(ctypes.CDLL(None).prctl, _PR_SET_PDEATHSIG, STOP_SIGNALS[0])
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") if log else nullcontext() as file:
        return subprocess.Popen([*_COMMAND, *arguments], stdout=file, env=environment, preexec_fn=end_with_parent)
