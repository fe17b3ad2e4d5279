"""Runs the steps of a study as commands, one after the other; each is skipped when done, and continues when stopped."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from fractaltrain.run_folder import RESULT
from fractaltrain.study.commands import RunCommand, passing_signals
from fractaltrain.study.plan import Group, Step
from fractaltrain.study.record import disagreement


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
    with passing_signals() as run:
        for group in groups:
            if group.pretraining and not _finish(group.pretraining, folder, nproc, run):
                missing += [step.run for step in group.steps()]
                continue
            missing += [step.run for step in group.finetunings if not _finish(step, folder, nproc, run)]
    return missing


def _finish(step: Step, folder: Path, nproc: int | None, run: RunCommand) -> bool:
    if problem := disagreement(folder / step.run, step.settings):
        click.echo(f"{folder / step.run}: {problem}", err=True)
        return False
    if is_done(step, folder):
        return True
    processes = () if nproc is None else ("--nproc", str(nproc))
    click.echo(f"\n$ fractaltrain {shlex.join((*step.arguments, *processes))}")
    code = run([sys.executable, "-m", "fractaltrain.cli", *step.arguments, *processes])
    if code:
        click.echo(f"{folder / step.run}: failed with exit code {code}; going on with what does not need it", err=True)
    return code == 0
