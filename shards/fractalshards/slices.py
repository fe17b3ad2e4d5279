"""Slices of a build for job arrays of batch systems: task I of K renders every K-th shard."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from fractalshards.errors import UsageError

_AUTO = "auto"
_Task = TypeVar("_Task")
# The variable with the number of a task, and those with the first number, the last number and the step of its array.
# SGE sets "undefined" outside of arrays. PBS Pro, OpenPBS and Torque set the number only.
_ARRAYS = {
    "SLURM_ARRAY_TASK_ID": ("SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_STEP"),
    "SGE_TASK_ID": ("SGE_TASK_FIRST", "SGE_TASK_LAST", "SGE_TASK_STEPSIZE"),
    "PBS_ARRAY_INDEX": (),
    "PBS_ARRAYID": (),
}


@dataclass(frozen=True)
class Slice:
    """Slice ``index`` of ``count``, counted from 1."""

    index: int
    count: int

    def of(self, tasks: tuple[_Task, ...]) -> tuple[_Task, ...]:
        """Return the tasks of this slice; all slices together hold every task once."""
        return tasks[self.index - 1 :: self.count]

    def __str__(self) -> str:
        return f"slice {self.index}/{self.count}"


def parse_slice(text: str, environment: Mapping[str, str]) -> Slice:
    """Parse ``I/K``, ``auto`` (this task of a job array) or ``auto/K`` (this task of K).

    SLURM and SGE set the number of the task and the range of its array. PBS sets the number only. With PBS, and for an
    array that runs in part, K must be given and tasks must be numbered from 1.
    """
    if match := re.fullmatch(r"(\d+)/(\d+)", text):
        return _checked(int(match[1]), int(match[2]), "--slice")
    if not (match := re.fullmatch(rf"{_AUTO}(?:/(\d+))?", text)):
        raise UsageError(f"--slice is {text!r}: expected I/K, {_AUTO} or {_AUTO}/K, e.g. 3/10 for the third of ten")
    task = next((name for name in _ARRAYS if _number(environment, name) is not None), None)
    if task is None:
        raise UsageError(f"--slice {text}: not a task of a job array (none of {', '.join(_ARRAYS)} is set)")
    number = _number(environment, task) or 0
    if match[1]:
        return _checked(number, int(match[1]), task)
    bounds = [_number(environment, name) for name in _ARRAYS[task]]
    if not bounds or None in bounds[:2]:
        raise UsageError(f"--slice {text}: {task} comes without the number of tasks; give --slice {_AUTO}/K")
    first, last, step = (bound or 0 for bound in bounds)
    return _checked((number - first) // max(step, 1) + 1, (last - first) // max(step, 1) + 1, task)


def _number(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name, "")
    return int(value) if value.isdecimal() else None


def _checked(index: int, count: int, source: str) -> Slice:
    if not 1 <= index <= count:
        raise UsageError(f"{source} is {index} of {count}: expected 1 to {count}")
    return Slice(index, count)
