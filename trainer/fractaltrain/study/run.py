"""Runs the steps of a study as commands, one after the other; each is skipped when done, and continues when stopped."""

import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import click

from fractalshards.errors import FractalError
from fractalshards.manifest import find_manifest
from fractalshards.sharing.urls import parse_location
from fractaltrain.preemption import EXIT_STOPPED, SIGNALS, stopped
from fractaltrain.run_folder import RESULT, RUN, flatten, read_settings
from fractaltrain.study.config import Study
from fractaltrain.study.plan import Group, Step

_INTERRUPT_SECONDS = 5.0


def check_datasets(study: Study, file: Path) -> None:
    """Look for all datasets on this machine before anything runs.

    Raises:
        FractalError: naming the first that is missing, and the command that makes it.
    """
    for row in study.rows:
        location = parse_location(row.shards)
        if location.scheme == "file":
            try:
                find_manifest(Path(location.root))
            except FractalError as error:
                advice = f"{row.shards}: no finished dataset; run {row.build}" if row.build else str(error)
                raise FractalError(f"{file}: [pretraining.{row.name}] {advice}") from error


def disagreement(step: Step, folder: Path) -> str | None:
    """What the run in a step's folder was made with that the study does not ask for; None: nothing, or no run yet."""
    if not (folder / step.run / RUN).exists():
        return None
    found, wanted = read_settings(folder / step.run), flatten(step.settings)
    name = next((name for name in wanted if found.get(name) != wanted[name]), None)
    return name and f"holds a run with {name} {found.get(name)}, not {wanted[name]}; remove it, or choose another --out"


def is_done(step: Step, folder: Path) -> bool:
    """Whether a step came to its end."""
    return (folder / step.run / RESULT).exists()


def describe(groups: Sequence[Group], folder: Path) -> Iterator[str]:
    """A line per step: whether it is done, and its command line."""
    for step in (step for group in groups for step in (group.pretraining, *group.finetunings) if step):
        state = "other" if disagreement(step, folder) else "done" if is_done(step, folder) else "to do"
        yield f"{state:<6}fractaltrain {shlex.join(step.arguments)}"


def run_groups(groups: Sequence[Group], folder: Path, nproc: int | None) -> list[str]:
    """Run all that is not done; return the runs that are missing in the end. A failure stops only what needs it.

    Raises:
        StoppedError: if a signal asked for it, after the step under way has saved.
    """
    missing = []
    for group in groups:
        if group.pretraining and not _finish(group.pretraining, folder, nproc):
            missing += [group.pretraining.run, *(step.run for step in group.finetunings)]
            continue
        missing += [step.run for step in group.finetunings if not _finish(step, folder, nproc)]
    return missing


def _finish(step: Step, folder: Path, nproc: int | None) -> bool:
    if problem := disagreement(step, folder):
        click.echo(f"{folder / step.run}: {problem}", err=True)
        return False
    if is_done(step, folder):
        return True
    processes = () if nproc is None else ("--nproc", str(nproc))
    click.echo(f"\n$ fractaltrain {shlex.join((*step.arguments, *processes))}")
    code = _run([sys.executable, "-m", "fractaltrain.cli", *step.arguments, *processes])
    if code:
        click.echo(f"{folder / step.run}: failed with exit code {code}; going on with what does not need it", err=True)
    return code == 0


def _run(command: Sequence[str]) -> int:
    """Run a command, passing on SIGTERM and SIGUSR1; a terminal gives Ctrl-C to the command itself."""
    asked: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if child is not None:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        child = subprocess.Popen(command)
        if asked:  # before there was a child
            child.send_signal(asked[0])
        code = child.wait()
    except KeyboardInterrupt:
        if child is not None:
            try:
                child.wait(_INTERRUPT_SECONDS)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGINT)
                child.wait()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked or code == EXIT_STOPPED or -code in SIGNALS:
        raise stopped(asked[0] if asked else signal.SIGTERM)
    if code == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    return code
