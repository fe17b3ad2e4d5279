"""Kind parameters on the command line: ``name=value`` onto the fields of a frozen dataclass."""

import math
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from fractalshards.errors import UsageError

_T = TypeVar("_T")
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def parse_overrides(params: type[_T], overrides: dict[str, str]) -> _T:
    """An instance of a parameter dataclass with its defaults, but for the named fields.

    Fields are int, float, bool, str or pairs of them (``low,high``).

    Raises:
        UsageError: if a name is unknown (the nearest is suggested), a text does not fit the field's type, or the
            dataclass refuses the value.
    """
    types = get_type_hints(params)
    values: dict[str, Any] = {}
    for name, text in overrides.items():
        if name not in types:
            near = get_close_matches(name, types, 1, cutoff=0.5)
            raise UsageError(
                f"unknown parameter {name!r}"
                + (f", did you mean {near[0]!r}?" if near else "")
                + f" (there are {', '.join(types)})"
            )
        values[name] = _parse(text, types[name], name)
    return params(**values)


def describe_parameters(params: type[Any]) -> list[tuple[str, str, str]]:
    """(name, default as one would type it, what it is) of every field of a parameter dataclass."""
    return [
        (field.name, _show(field.default), field.metadata.get("help", ""))
        for field in fields(params)
        if field.default is not MISSING
    ]


def _parse(text: str, kind: Any, name: str) -> Any:
    if get_origin(kind) is tuple:
        parts = text.split(",")
        kinds = get_args(kind)
        if len(parts) != len(kinds):
            raise UsageError(f"{name}={text}: expected {len(kinds)} values with commas between them")
        return tuple(_parse(part.strip(), inner, name) for part, inner in zip(parts, kinds, strict=True))
    try:
        value = _BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        raise UsageError(f"{name}={text}: expected {kind.__name__}") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{name}={text}: expected a finite number")
    return value


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_show, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
