"""Runs the steps of a study, some at once; each is skipped when done, continues when stopped, and may fail alone."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click

from fractalshards.console import is_quiet, note
from fractalshards.human import human_count
from fractalshards.workers import available_cores
from fractaltrain.run_folder import RESULT
from fractaltrain.study.plan import Group, Step
from fractaltrain.study.processes import Processes, step_processes
from fractaltrain.study.record import problem_of

_LOGS = "log"


class Standing(NamedTuple):
    """A step, whether it is done, and why what is in its folder cannot be used; None: it can be."""

    step: Step
    done: bool
    problem: str | None


def is_done(step: Step, folder: Path) -> bool:
    """Whether a step came to its end."""
    return (folder / step.run / RESULT).exists()


def standings(group: Group, folder: Path) -> list[Standing]:
    """How far the steps of a group are; none can be used that starts from what cannot be."""
    found: dict[str, Standing] = {}
    for step in group.steps():
        problem = problem_of(folder, step.run, step.settings, step.start)
        if step.start and found[step.start].problem and (folder / step.run).exists():
            problem = f"starts from {step.start}, which is not usable; remove it, too"
        found[step.run] = Standing(step, is_done(step, folder) and not problem, problem)
    return list(found.values())


def run_groups(groups: Sequence[Group], folder: Path, nproc: int | None, jobs: int = 1) -> list[str]:
    """Run all that is not done; return the runs that are missing in the end. A failure stops only what needs it.

    Args:
        nproc: processes of each step; None: as many as there are GPUs.
        jobs: steps that run at once. If several, what they say is written into the study's folder.

    Raises:
        StoppedError: if a signal asked for it, after the steps under way have saved.
    """
    waiting = [step for group in groups for step in group.steps()]
    found = [standing for group in groups for standing in standings(group, folder)]
    refused = {standing.step.run: standing.problem for standing in found if standing.problem}
    for run, problem in refused.items():
        click.echo(f"{folder / run}: {problem}", err=True)
    if ready := sum(standing.done for standing in found):
        note(f"{folder}: done already: {ready:,} of {human_count(len(waiting), 'step')}")
    if jobs > 1:
        note(f"{folder / _LOGS}: what the steps say")
    done: dict[str, bool] = {}  # whether a step that has been tried came to its end
    threads = max(available_cores() // (jobs * (nproc or 1)), 1) if jobs > 1 else None
    with step_processes(threads) as processes:
        while waiting or processes.running:
            step = _startable(waiting, done) if processes.running < jobs else None
            if step:
                waiting.remove(step)
                settled = False if step.run in refused else _settled(step, folder, done)
                if settled is None:
                    _start(step, folder, nproc, processes, logged=jobs > 1)
                else:
                    done[step.run] = settled
            else:
                run, code = processes.wait()
                done[run] = code == 0
                _tell_end(folder, run, code, logged=jobs > 1)
    return [step.run for group in groups for step in group.steps() if not done[step.run]]


def _startable(waiting: Sequence[Step], done: Mapping[str, bool]) -> Step | None:
    """The first step that starts from nothing, or from what has been tried."""
    return next((step for step in waiting if step.start is None or step.start in done), None)


def _settled(step: Step, folder: Path, done: Mapping[str, bool]) -> bool | None:
    """Whether a step is done, or never will be; None: it is to be run."""
    if step.start and not done[step.start]:
        return False
    if problem := problem_of(folder, step.run, step.settings, step.start):  # what it starts from may be new
        click.echo(f"{folder / step.run}: {problem}", err=True)
        return False
    return True if is_done(step, folder) else None


def _start(step: Step, folder: Path, nproc: int | None, processes: Processes, logged: bool) -> None:
    arguments = step.arguments + (() if nproc is None else ("--nproc", str(nproc)))
    if is_quiet():
        arguments += ("--quiet",)
    else:
        click.echo(f"{'' if logged else chr(10)}$ fractaltrain {shlex.join(arguments)}")
    processes.start(step.run, arguments, _log(folder, step.run) if logged else None)


def _tell_end(folder: Path, run: str, code: int, logged: bool) -> None:
    if code:
        click.echo(f"{folder / run}: failed with exit code {code}; going on with what does not need it", err=True)
    elif logged and not is_quiet():
        click.echo(f"{folder / run}: done")


def _log(folder: Path, run: str) -> Path:
    return folder / _LOGS / f"{run}.txt"
