"""What a kind is: the record that each of the files beside this one ends with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fractalgen.unit import Unit
from fractalshards.labels import LabelType
from fractalshards.systems import Systems
from fractalshards.writer import Rendered

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


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
