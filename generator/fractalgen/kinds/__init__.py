"""The registry of kinds: a new kind is one new file beside this one, and one line in ``KINDS``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fractalgen import anderson
from fractalgen.kinds import fractaldb, multi, single
from fractalgen.unit import Unit
from fractalshards.errors import UsageError
from fractalshards.labels import LabelType
from fractalshards.overrides import nearest
from fractalshards.systems import Systems
from fractalshards.writer import Rendered

KindParams = fractaldb.FractaldbParams | single.SingleParams | multi.MultiParams


def _without_end(params: Any) -> None:
    return None


@dataclass(frozen=True)
class Kind:
    """A family of images.

    Attributes:
        summary: one line for ``--help``.
        params: a frozen dataclass whose fields are the kind's parameters, with defaults, checked when made.
        classes, size, points: defaults of a recipe.
        draw_systems: (params, seed, classes) -> the systems of all classes, float64 arrays.
        render: (params, size, points, unit, systems) -> ``images_per_unit`` images with their labels; an image is
            (size, size, 3) uint8 or indexed. All random numbers come from the unit's identity.
        map_shape: of one map of a system: (2, 3), or (7,) for the categories of FractalDB.
        label_type: ``single``: one class per image, balanced over the dataset; ``multi``: what an image shows.
        images_per_unit: images that share one render, and so lie in one shard.
        units_per_class: params -> how many units a class has at most; None for no end.
    """

    summary: str
    params: type[KindParams]
    classes: int
    size: int
    points: int
    draw_systems: Callable[[Any, int, int], Systems]
    render: Callable[[Any, int, int, Unit, Systems], Sequence[Rendered]]
    map_shape: tuple[int, ...] = (2, 3)
    label_type: LabelType = "single"
    images_per_unit: int = 1
    units_per_class: Callable[[Any], int | None] = _without_end


KINDS: dict[str, Kind] = {
    "fractaldb": Kind(
        summary="one category of FractalDB, grey or coloured, on black (Kataoka et al. 2020)",
        params=fractaldb.FractaldbParams,
        classes=1000,
        size=362,
        points=200_000,
        draw_systems=fractaldb.draw_systems,
        render=fractaldb.render,
        map_shape=(7,),
        images_per_unit=fractaldb.FLIPS,
        units_per_class=fractaldb.units_per_class,
    ),
    "single": Kind(
        summary="one coloured fractal on a noise background (Anderson & Farrell 2022)",
        params=single.SingleParams,
        classes=1000,
        size=224,
        points=100_000,
        draw_systems=anderson.draw_systems,
        render=single.render,
    ),
    "multi": Kind(
        summary="several coloured fractals of several classes on a noise background (Anderson & Farrell 2022)",
        params=multi.MultiParams,
        classes=1000,
        size=224,
        points=100_000,
        draw_systems=anderson.draw_systems,
        render=multi.render,
        label_type="multi",
    ),
}


def find_kind(name: str) -> Kind:
    """The kind of that name.

    Raises:
        UsageError: if there is none; the nearest name is suggested.
    """
    if name not in KINDS:
        raise UsageError(f"unknown kind {name!r}{nearest(name, KINDS)}")
    return KINDS[name]
