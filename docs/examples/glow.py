"""Kind ``glow``: a fractal in white light on black, brighter where it is hit more often.

fractalgen build --kind glow --n 100000
"""

from dataclasses import dataclass

import numpy as np

from fractalgen.kernels.chaos_game import chaos_game
from fractalgen.kernels.random import Stream
from fractalgen.kernels.raster import Orientation, bounding_box, splat
from fractalgen.kinds import anderson
from fractalgen.kinds.kind import Kind, Unit, check_parameters, parameter
from fractalshards.png import Indexed
from fractalshards.systems import Systems
from fractalshards.writer import Rendered

_GREYS = [0] + [min(60 + 25 * doublings, 255) for doublings in range(31)]
_PALETTE = np.array([(grey, grey, grey) for grey in _GREYS], np.uint8)


@dataclass(frozen=True)
class GlowParams:
    """Parameters for ``--set``, each with its default, a line of help and its range."""

    maps: tuple[int, int] = parameter((2, 4), "number of maps of a system, both ends included", 2, 255)
    zoom: tuple[float, float] = parameter((0.5, 1.0), "share of the extent that the window shows", 0.01, 1.0)
    flips: bool = parameter(True, "transpose and mirror at random")

    def __post_init__(self) -> None:
        check_parameters(self)


def draw_systems(params: GlowParams, seed: int, classes: int) -> Systems:
    """Draw a system per class, (maps, 2, 3) float64, as Anderson & Farrell do."""
    return anderson.draw_systems(anderson.AndersonParams(maps=params.maps), seed, classes)


def render(params: GlowParams, size: int, points: int, unit: Unit, systems: Systems) -> tuple[Rendered]:
    """Render one image, (size, size) indexed; each doubling of a pixel's hits is a step of brightness."""
    rng = Stream.of("glow", *unit.identity())
    xs, ys = chaos_game(systems[unit.label], points, rng.key())
    left, bottom, right, top = bounding_box(xs, ys)
    zoom = rng.uniform(*params.zoom)
    width, height = zoom * (right - left), zoom * (top - bottom)
    x, y = rng.uniform(left, right - width), rng.uniform(bottom, top - height)
    orientation = Orientation(*(rng.chance(0.5) for _ in range(3))) if params.flips else Orientation()
    counts = splat(xs, ys, size, (x, y, x + width, y + height), orientation=orientation)
    _, doublings = np.frexp(counts)  # exact, so the same on every machine; a logarithm would not be
    return ((Indexed(doublings.astype(np.uint8), _PALETTE), unit.label),)


KIND = Kind(
    name="glow",
    summary="one fractal in white light on black",
    params=GlowParams,
    classes=1000,
    size=224,
    points=100_000,
    draw_systems=draw_systems,
    render=render,
)
