"""Values of options: ``--set NAME=VALUE`` for the fields of a frozen dataclass, ``--slice I/K`` for job arrays."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from fractalshards.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_T = TypeVar("_T", bound="DataclassInstance")
_Task = TypeVar("_Task")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_WANTED = {int: "an integer", float: "a number", bool: "true or false"}


def parse_settings(settings: Sequence[str], option: str = "--set") -> dict[str, str]:
    """Parse ``["a=1", "b=2,3"]`` to ``{"a": "1", "b": "2,3"}``; the last setting of a name wins."""
    parsed = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (name and equals):
            raise UsageError(f"{option} {setting}: expected NAME=VALUE")
        parsed[name] = value
    return parsed


def override(record: _T, changes: Mapping[str, object], fixed: Collection[str] = ()) -> _T:
    """Return a copy of a frozen dataclass with other values in some fields, given as text or as values.

    Fields are int, float, bool or a ``Literal`` of strings, any of these or None (``none``), or tuples of them
    (``low,high``; a single value fills all places).

    Raises UsageError if a field does not exist (similar names are suggested) or is in ``fixed``, a text does not fit
    its type, or the dataclass refuses a value.
    """
    hints = get_type_hints(type(record))  # class variables are among them
    types = {field.name: hints[field.name] for field in fields(record) if field.name not in fixed}
    for name in changes:
        if name not in types:
            raise UsageError(f"unknown parameter {name!r}{nearest(name, types)}")
    values = {name: _parse(show_value(value), types[name], name) for name, value in changes.items()}
    return replace(record, **values)


def nearest(name: str, names: Collection[str]) -> str:
    """Return the end of an error message: the names that were probably meant, or all names."""
    meant = [known for known in names if name and known.startswith(name)] or get_close_matches(name, names)
    return f", did you mean {' or '.join(map(repr, meant))}?" if meant else f" (there are {', '.join(names)})"


def _parse(text: str, kind: Any, name: str) -> Any:
    inner = get_args(kind)
    if get_origin(kind) is tuple:
        parts = text.split(",")
        if len(parts) not in (1, len(inner)):
            raise UsageError(f"{name}={text}: expected one value, or {len(inner)} separated by commas")
        parts = parts * (len(inner) // len(parts))
        return tuple(_parse(part.strip(), one, name) for part, one in zip(parts, inner, strict=True))
    if get_origin(kind) is Literal:
        if text not in inner:
            raise UsageError(f"{name}={text}: expected {' or '.join(inner)}")
        return text
    if type(None) in inner:
        return None if text.lower() == "none" else _parse(text, inner[0], name)
    try:
        value = _BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        raise UsageError(f"{name}={text}: expected {_WANTED[kind]}") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name}={text}: expected a finite number")
    return value


def show_value(value: object) -> str:
    """Format a value as it is typed after ``NAME=``."""
    if isinstance(value, tuple | list):
        return ",".join(map(show_value, value))
    return str(value).lower() if isinstance(value, bool | None) else str(value)


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

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise UsageError(f"--slice is {self.index} of {self.count}: number the tasks 1 to {self.count}")

    def of(self, tasks: tuple[_Task, ...]) -> tuple[_Task, ...]:
        """Return the tasks of this slice; all slices together hold every task once."""
        return tasks[self.index - 1 :: self.count]

    def __str__(self) -> str:
        return f"slice {self.index}/{self.count}"


def parse_slice(text: str, environment: Mapping[str, str]) -> Slice:
    """Parse ``I/K``, ``auto`` (this task of a job array) or ``auto/K`` (this task of K).

    SLURM and SGE set the number of the task and the range of its array, PBS the number only. With PBS, and for a part
    of an array, K must be given and tasks must be numbered from 1.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})|auto(?:/(\d{1,9}))?", text)
    if match is None:
        raise UsageError(f"--slice is {text!r}: expected I/K, auto or auto/K, e.g. 3/10 for the third of ten")
    if match[1]:
        return Slice(int(match[1]), int(match[2]))
    numbers = {name: int(value) for name, value in environment.items() if re.fullmatch(r"\d{1,9}", value)}
    task = next((name for name in _ARRAYS if name in numbers), None)
    if task is None:
        raise UsageError(f"--slice {text}: not a task of a job array (none of {', '.join(_ARRAYS)} is set)")
    if match[3]:
        return Slice(numbers[task], int(match[3]))
    bounds = [numbers.get(name) for name in _ARRAYS[task]]
    if not bounds or None in bounds[:2]:
        raise UsageError(f"--slice {text}: {task} is set, but not the number of tasks; give --slice auto/K")
    first, last, step = (bound or 0 for bound in bounds)
    return Slice((numbers[task] - first) // max(step, 1) + 1, (last - first) // max(step, 1) + 1)
