"""Runs the steps of a study as commands, one after the other; each is skipped when done, and continues when stopped."""

import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import click

from fractaltrain.preemption import EXIT_STOPPED, SIGNALS, stopped
from fractaltrain.run_folder import RESULT
from fractaltrain.study.plan import Group, Step
from fractaltrain.study.record import disagreement

_INTERRUPT_SECONDS = 5.0


def is_done(step: Step, folder: Path) -> bool:
    """Whether a step came to its end."""
    return (folder / step.run / RESULT).exists()


def any_finished(groups: Sequence[Group], folder: Path) -> bool:
    """Whether there is a fine-tuning to compare: done as the study asks, and so is what it starts from."""
    return any(
        is_done(step, folder) and not disagreement(folder / step.run, step.settings)
        for group in groups
        if not (start := group.pretraining) or not disagreement(folder / start.run, start.settings)
        for step in group.finetunings
    )


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
    if problem := disagreement(folder / step.run, step.settings):
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
