"""The registry of kinds: a new kind is one new file beside this one, and one line in ``KINDS``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fractalgen.color import Pixels
from fractalgen.kinds import single
from fractalshards.errors import UsageError
from fractalshards.overrides import nearest

KindParams = single.SingleParams


@dataclass(frozen=True)
class Kind:
    """A family of images.

    Attributes:
        summary: one line for ``--help``.
        params: a frozen dataclass whose fields are the kind's parameters, with defaults, checked when made.
        classes, size, points: defaults of a recipe.
        draw_system: (params, seed, class) -> the class's system (maps, 2, 3) float64.
        render: (params, size, points, identity, system) -> image (size, size, 3) uint8; the identity is what the
            image's random numbers come from.
    """

    summary: str
    params: type[KindParams]
    classes: int
    size: int
    points: int
    draw_system: Callable[[Any, int, int], npt.NDArray[np.float64]]
    render: Callable[[Any, int, int, tuple[str | int, ...], npt.NDArray[np.float64]], Pixels]


KINDS: dict[str, Kind] = {
    "single": Kind(
        summary="one coloured fractal on a noise background (Anderson & Farrell 2022)",
        params=single.SingleParams,
        classes=1000,
        size=224,
        points=100_000,
        draw_system=single.draw_system,
        render=single.render,
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
