"""How large an image, a chaos game and a system may be, for whoever draws one."""

from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from fractalshards.errors import UsageError
from fractalshards.sample import LabelType
from fractalshards.systems import Systems
from fractalshards.writer import Rendered

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


SIZES = range(16, 4097)  # pixels of a side
MAX_POINTS = 10**8
MAX_MAPS = 255  # the number of a map is a byte, and one more means none


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


@dataclass(frozen=True)
class Unit:
    """The ``number``-th render of a class in a split.

    Attributes:
        seed: of the recipe.
        split: ``train`` or ``val``.
        label: class index; kinds whose images show several classes take it as part of the identity only.
        number: counts the renders of the class in the split from 0.
        before: renders of a class in the splits before this one, at most; for kinds that number renders on.
    """

    seed: int
    split: str
    label: int
    number: int
    before: int = 0

    def identity(self) -> tuple[str | int, ...]:
        """What ``rng.Stream.of`` takes after the name of the kind."""
        return self.seed, self.split, self.label, self.number


def _without_end(params: Any) -> None:
    return None


@dataclass(frozen=True)
class Kind:
    """A family of images.

    Attributes:
        name: as ``--kind`` calls it.
        summary: one line for ``--help``.
        params: a frozen dataclass whose fields are ``params.parameter``, with defaults, checked when made.
        classes: default of a recipe; so are
        size: the side length in pixels, and
        points: the points of a chaos game.
        draw_systems: (params, seed, classes) -> the systems of all classes, float64 arrays.
        render: (params, size, points, unit, systems) -> ``images_per_unit`` images with their labels; an image is
            (size, size, 3) uint8 or indexed. All random numbers come from the unit's identity.
        map_shape: of one map of a system: (2, 3), or (7,) for the categories of FractalDB.
        label_type: ``single``: one class per image, balanced over the dataset; ``multi``: what an image shows.
        images_per_unit: images that share one render, and so lie in one shard.
        units_per_class: params -> how many units a class has at most; None for no end.
    """

    name: str
    summary: str
    params: "type[DataclassInstance]"
    classes: int
    size: int
    points: int
    draw_systems: Callable[[Any, int, int], Systems]
    render: Callable[[Any, int, int, Unit, Systems], Sequence[Rendered]]
    map_shape: tuple[int, ...] = (2, 3)
    label_type: LabelType = "single"
    images_per_unit: int = 1
    units_per_class: Callable[[Any], int | None] = _without_end
