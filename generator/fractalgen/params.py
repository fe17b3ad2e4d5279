"""Parameters of kinds: fields of frozen dataclasses that explain themselves and know their range."""

from dataclasses import Field, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from fractalshards.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def parameter(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field with a default, a line for ``fractalgen kinds``, and the range of numbers that it takes.

    Args:
        default: its value unless ``--set`` changes it.
        help: what it is, in one line.
        low: the least value; None for texts and for true and false.
        high: the greatest value.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high})


def check_parameters(params: "DataclassInstance") -> None:
    """Refuse numbers outside the range of their field, and pairs that are not (low, high); for ``__post_init__``.

    Raises:
        UsageError: then; it names the field.
    """
    for one in fields(params):
        low, high, value = one.metadata["low"], one.metadata["high"], getattr(params, one.name)
        if low is None:
            continue
        if isinstance(value, tuple):
            if not low <= value[0] <= value[1] <= high:
                raise UsageError(f"{one.name} is {value[0]},{value[1]}: expected {low} <= low <= high <= {high}")
        elif not low <= value <= high:
            raise UsageError(f"{one.name} is {value}: expected {low} to {high}")


def show_range(params: "type[DataclassInstance]", parameter: "Field[Any]") -> str:
    """What a parameter may be, in the words of ``fractalgen kinds``: ``0.0 to 1.0`` or all that it takes."""
    kind = get_type_hints(params)[parameter.name]
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    if kind is bool:
        return "true, false"
    return f"{parameter.metadata['low']} to {parameter.metadata['high']}"
