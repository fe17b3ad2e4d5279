"""Reads fields of JSON that came from outside: every access checks presence and type, every error names the file."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from fractalshards.errors import FractalError
from fractalshards.storage import read_bounded

MAX_JSON_BYTES = 16 << 20  # parsed, an empty list takes 24 times its text
_MAX_COUNT = 2**63 - 1
_MAX_DEPTH = 32
_MAX_VALUES = 1_000_000  # of what is kept as it is
_ADVICE = "the file is damaged or not of this format, fetch or build it again"
_T = TypeVar("_T")


class Fields:
    """A JSON object and the place it was read from."""

    def __init__(self, data: object, where: str, advice: str = _ADVICE) -> None:
        """``advice`` ends every error: what to do about a damaged file."""
        if not isinstance(data, dict):
            raise FractalError(f"{where}: expected a JSON object, found {type(data).__name__}; {advice}")
        self._data: dict[str, Any] = data
        self._where = where
        self._advice = advice

    @classmethod
    def read(cls, path: Path, advice: str = _ADVICE) -> "Fields":
        """Read a JSON object from a file of at most 16 MiB.

        Raises:
            FractalError: if it is larger, not a regular file, not JSON, or not an object.
            OSError: if it cannot be read.
        """
        return cls.parse(read_bounded(path, MAX_JSON_BYTES), str(path), advice)

    @classmethod
    def parse(cls, text: bytes, where: str, advice: str = _ADVICE) -> "Fields":
        """Parse a JSON object that came from ``where``.

        Raises:
            FractalError: if it is not JSON, or not an object.
        """
        try:
            return cls(json.loads(text, parse_constant=_refuse_constant, parse_float=_finite), where, advice)
        except (ValueError, RecursionError) as error:
            raise FractalError(f"{where}: not valid JSON ({error}); {advice}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._data

    def is_null(self, name: str) -> bool:
        """Whether a field is there and says nothing."""
        return name in self._data and self._data[name] is None

    def text(self, name: str) -> str:
        """A string field."""
        return self._get(name, str, "text")

    def count(self, name: str) -> int:
        """A field that counts something: an integer, not negative."""
        return self._check_count(self._get(name, int, "an integer"), name)

    def counts(self, name: str) -> tuple[int, ...]:
        """A list of counts."""
        return tuple(self._check_count(value, name) for value in self._get(name, list, "a list"))

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self._get(name, list, "a list")
        if not all(isinstance(value, str) for value in values):
            raise FractalError(f"{self._where}: {name} is not a list of texts; {self._advice}")
        return tuple(values)

    def items(self, name: str) -> list[Any]:
        """A JSON list as it is."""
        return self._get(name, list, "a list")

    def mapping(self, name: str) -> dict[str, Any]:
        """A JSON object as it is: a million values at most, nested 32 deep at most, as what is done may recurse."""
        value: dict[str, Any] = self._get(name, dict, "an object")
        if not _is_shallow(value, _MAX_DEPTH):
            raise FractalError(f"{self._where}: {name} is nested more than {_MAX_DEPTH} deep; {self._advice}")
        if _values(value) > _MAX_VALUES:
            raise FractalError(f"{self._where}: {name} has more than {_MAX_VALUES:,} values; {self._advice}")
        return value

    def inner(self, name: str) -> "Fields":
        """A JSON object whose fields are checked in turn."""
        return Fields(self._data.get(name), f"{self._where}: {name}", self._advice)

    def inners(self, name: str) -> "tuple[Fields, ...]":
        """A list of JSON objects whose fields are checked in turn."""
        return tuple(Fields(value, f"{self._where}: {name}", self._advice) for value in self._get(name, list, "a list"))

    def _get(self, name: str, kind: type[_T], called: str) -> _T:
        value = self._data.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise FractalError(f"{self._where}: {name} is missing or not {called}; {self._advice}")
        return value

    def _check_count(self, value: object, name: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_COUNT:
            shown = repr(str(value)[:40]) if isinstance(value, int | float | str) else type(value).__name__
            raise FractalError(f"{self._where}: {name} is not a count: {shown}; {self._advice}")
        return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _is_shallow(value: object, levels: int) -> bool:
    """Whether lists and objects are nested at most so many levels deep."""
    if not isinstance(value, dict | list):
        return True
    return levels > 0 and all(_is_shallow(inner, levels - 1) for inner in _inside(value))


def _values(value: object) -> int:
    """The number of values in a value, itself included."""
    return 1 + sum(map(_values, _inside(value))) if isinstance(value, dict | list) else 1


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value
