"""Parameters of kinds: fields of frozen dataclasses that explain themselves, and checks of their values."""

from dataclasses import field
from typing import Any

from fractalshards.errors import UsageError


def parameter(default: Any, help: str) -> Any:
    """A dataclass field with a default and a line for ``fractalgen kinds``."""
    return field(default=default, metadata={"help": help})


def check_range(name: str, pair: tuple[float, float], low: float, high: float) -> None:
    """Refuse a pair that is not low <= pair[0] <= pair[1] <= high.

    Raises:
        UsageError: then.
    """
    if not low <= pair[0] <= pair[1] <= high:
        raise UsageError(f"{name} is {pair[0]},{pair[1]}: expected {low} <= low <= high <= {high}")


def check_number(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside [low, high].

    Raises:
        UsageError: then.
    """
    if not low <= value <= high:
        raise UsageError(f"{name} is {value}: expected {low} to {high}")
