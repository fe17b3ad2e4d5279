"""A part of a work, for the job arrays of batch systems: task I of K does every K-th piece."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from fractalshards.errors import UsageError

_AUTO = "auto"
_Task = TypeVar("_Task")
# By the variable that holds a task's number, those that hold the first, the last and the step of the array's numbers.
# SGE says "undefined" outside of arrays. PBS Pro, OpenPBS and Torque tell the number alone.
_ARRAYS = {
    "SLURM_ARRAY_TASK_ID": ("SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_STEP"),
    "SGE_TASK_ID": ("SGE_TASK_FIRST", "SGE_TASK_LAST", "SGE_TASK_STEPSIZE"),
    "PBS_ARRAY_INDEX": (),
    "PBS_ARRAYID": (),
}


@dataclass(frozen=True)
class Slice:
    """Part ``index`` of ``count``, counted from 1."""

    index: int
    count: int

    def of(self, tasks: tuple[_Task, ...]) -> tuple[_Task, ...]:
        """The tasks of this part; the parts of all indices together are all tasks, each once."""
        return tasks[self.index - 1 :: self.count]

    def __str__(self) -> str:
        return f"slice {self.index}/{self.count}"


def parse_slice(text: str, environment: Mapping[str, str]) -> Slice:
    """The part that ``I/K`` names; ``auto``: the one that is this task's of a job array; ``auto/K``: the same, of K.

    SLURM and SGE tell a task its number and those of the whole array, however it is numbered. PBS tells only the
    number: there, as for any array that is not run whole, it counts from 1, and K is given.

    Raises:
        UsageError: if the text is neither, the numbers do not fit, or no batch system gave a number.
    """
    if match := re.fullmatch(r"(\d+)/(\d+)", text):
        return _checked(int(match[1]), int(match[2]), "--slice")
    if not (match := re.fullmatch(rf"{_AUTO}(?:/(\d+))?", text)):
        raise UsageError(
            f"--slice is {text!r}: expected I/K, {_AUTO} or {_AUTO}/K, e.g. 3/10 for the third of ten parts"
        )
    task = next((name for name in _ARRAYS if _number(environment, name) is not None), None)
    if task is None:
        raise UsageError(f"--slice {text}: this is no task of a job array (none of {', '.join(_ARRAYS)} is set)")
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
        raise UsageError(f"{source} says part {index} of {count}: expected 1 to {count}")
    return Slice(index, count)
