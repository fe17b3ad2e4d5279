"""The ``Kind`` record, and the parameters of a kind."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import Field, dataclass, field, fields
from itertools import islice
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fractalshards.errors import UsageError
from fractalshards.sample import LabelType
from fractalshards.settings import show_value
from fractalshards.systems import Systems
from fractalshards.workers import OnProgress
from fractalshards.writer import Rendered


def parameter(default: Any, help: str, low: float | None = None, high: float | None = None) -> Any:
    """Declare a parameter of a kind: a dataclass field with a default, a line of help, and bounds if it is a number."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


def check_parameters(params: Any) -> None:
    """Raise UsageError if a number is out of the range of its field, or a pair is not (low, high)."""
    for one in fields(params):
        low, high, value = one.metadata["low"], one.metadata["high"], getattr(params, one.name)
        first, last = value if isinstance(value, tuple) else (value, value)
        if low is not None and not low <= first <= last <= high:
            order = ", the smaller one first" if isinstance(value, tuple) else ""
            raise UsageError(f"{one.name} is {show_value(value)}: expected {low} to {high}{order}")


def show_range(params: type[Any], parameter: Field[Any]) -> str:
    """Describe the values that a parameter accepts: ``0.0 to 1.0``, or a list."""
    hint = get_type_hints(params)[parameter.name]
    if get_origin(hint) is Literal:
        return ", ".join(get_args(hint))
    if hint is bool:
        return "true, false"
    return f"{parameter.metadata['low']} to {parameter.metadata['high']}"


@dataclass(frozen=True)
class Unit:
    """A render: number ``number`` of a class in a split.

    Attributes:
        seed: the recipe's seed.
        split: ``train`` or ``val``.
        label: class index; for kinds whose images show several classes, merely part of the identity.
        number: index of the render among those of its class and split; training on fresh images counts on from epoch
            to epoch.
        per_class: the most renders of a class in ``train`` and in ``val`` of a build, for kinds that number renders
            across splits.
    """

    seed: int
    split: str
    label: int
    number: int
    per_class: tuple[int, int] = (0, 0)

    def identity(self) -> tuple[str | int, ...]:
        """Return the arguments of ``Stream.of`` that follow the name of the kind."""
        return self.seed, self.split, self.label, self.number


class LazyImages(Sequence[Rendered]):
    """The images of a unit, rendered when they are asked for: one by its index, or one after the other.

    ``render(first)`` yields the ``count`` images from number ``first`` on, and perhaps more.
    """

    def __init__(self, render: Callable[[int], Iterator[Rendered]], count: int) -> None:
        self._render, self._count = render, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        return next(self._render(range(self._count)[index]))

    def __iter__(self) -> Iterator[Rendered]:
        return islice(self._render(0), self._count)


@dataclass(frozen=True)
class Kind:
    """A family of images.

    Attributes:
        name: the value of ``--kind``.
        summary: one line for ``fractalgen kinds``.
        params: a frozen dataclass whose fields are made by ``parameter`` and checked in ``__post_init__``.
        classes: default number of classes.
        size: default side length in pixels.
        points: default number of points of a chaos game; 0 if the kind plays none.
        draw_systems: (params, seed, classes) -> the systems of all classes, float64 arrays.
        render: (params, size, points, unit, systems) -> ``images_per_unit`` images with their labels, perhaps as
            ``LazyImages``; an image is (size, size, 3) uint8 or indexed. All random numbers come from the
            unit's identity.
        map_shape: shape of one map of a system: (2, 3), or (7,) for FractalDB categories, (12,) for contours.
        label_type: ``single``: one class per image, balanced over the dataset; ``multi``: the visible objects.
        n: default number of training images, if there is one.
        images_per_unit: number of images that share a render, and are therefore in one shard.
        images_in_memory: number of images of a unit that take memory of their own; flips share that of one.
        units_per_class: params -> the most units that a class can have; None if there is no limit.
        check: (params, n, val, classes) -> None; raises a UsageError if the kind cannot render so many images.
        prepare: (params, classes, on_progress) -> None: computes what all workers share, if it is missing. Whoever
            coordinates them calls it, to show the progress; a worker that needs the same computes it itself.
        preview: settings of a preview, as after ``--set``, since it has few classes.
    """

    name: str
    summary: str
    params: type[Any]
    size: int
    points: int
    draw_systems: Callable[[Any, int, int], Systems]
    render: Callable[[Any, int, int, Unit, Systems], Sequence[Rendered]]
    classes: int = 1000
    map_shape: tuple[int, ...] = (2, 3)
    label_type: LabelType = "single"
    n: int | None = None
    images_per_unit: int = 1
    images_in_memory: int = 1
    units_per_class: Callable[[Any], int | None] = lambda params: None
    check: Callable[[Any, int, int, int], None] = lambda params, n, val, classes: None
    prepare: Callable[[Any, int, OnProgress], None] = lambda params, classes, on_progress: None
    preview: tuple[str, ...] = ()
