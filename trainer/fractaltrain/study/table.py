"""Reads tables of a TOML file that a person wrote: every error names the file, the table and the key."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fractalshards.errors import UsageError
from fractalshards.names import is_plain
from fractalshards.overrides import nearest


class Table:
    """A table of a TOML file, whose keys are all known; any other is an error that suggests the nearest."""

    def __init__(self, data: object, file: Path, name: str, known: tuple[str, ...] | None) -> None:
        """Check the keys. ``known`` None: the keys are names that the user chose, plain as those of files.

        Raises:
            UsageError: if it is no table, or a key is not known.
        """
        self._file, self._name = file, name
        if not isinstance(data, Mapping):
            raise self.error("must be a table")
        self._data = data
        for key in data:
            if known is not None and key not in known:
                raise self.error(f"has no field {key!r}{nearest(key, known)}")
            if known is None and not is_plain(key):
                raise self.error(f"{key!r} cannot be part of a file's name; choose letters, digits, -, _ and .")

    def error(self, text: str) -> UsageError:
        """An error about this table."""
        return UsageError(f"{self._file}: [{self._name}] {text}" if self._name else f"{self._file}: {text}")

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def names(self) -> tuple[str, ...]:
        """The keys, in the order of the file."""
        return tuple(self._data)

    def inner(self, key: str, known: tuple[str, ...] | None) -> "Table":
        """A table inside; an empty one where there is none."""
        return Table(self._data.get(key, {}), self._file, f"{self._name}.{key}" if self._name else key, known)

    def text(self, key: str) -> str | None:
        """A text that is not empty, or None where there is none."""
        value = self._data.get(key)
        if value is not None and not (isinstance(value, str) and value):
            raise self.error(f"{key} is {value!r}, but must be a text")
        return value

    def need(self, key: str) -> str:
        """A text that must be there."""
        value = self.text(key)
        if value is None:
            raise self.error(f"needs {key}")
        return value

    def count(self, key: str, least: int) -> int | None:
        """A whole number, or None where there is none."""
        return None if key not in self._data else self._count(key, self._data[key], least)

    def counts(self, key: str, least: int) -> tuple[int, ...]:
        """A list of different whole numbers, one or more; empty where there is none."""
        if key not in self._data:
            return ()
        values = self._data[key]
        if not isinstance(values, list) or not values or len(set(map(str, values))) != len(values):
            raise self.error(f"{key} is {values!r}, but must be a list of different whole numbers")
        return tuple(self._count(key, value, least) for value in values)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; empty where there is none."""
        values = self._data.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self.error(f"{key} is {values!r}, but must be a list of texts")
        return tuple(values)

    def plain(self) -> dict[str, Any]:
        """All fields as they are."""
        return dict(self._data)

    def _count(self, key: str, value: object, least: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(f"{key} is {value!r}, but must be a whole number of at least {least}")
        return value
