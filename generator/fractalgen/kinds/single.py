"""Kind ``single``: one coloured fractal on a diamond-square background (Anderson & Farrell, WACV 2022).

fractalgen build --kind single --n 1000000
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fractalgen.kernels.chaos_game import chaos_game
from fractalgen.kernels.paint import paint
from fractalgen.kernels.random import Stream
from fractalgen.kernels.raster import Window, bounding_box, splat
from fractalgen.kinds import anderson
from fractalgen.kinds.kind import Kind, Unit, parameter
from fractalshards.systems import Systems
from fractalshards.writer import Rendered

_JITTER_TRIES = 4


@dataclass(frozen=True)
class SingleParams(anderson.AndersonParams):
    """Parameters with the published values as defaults; pairs bound a uniform distribution."""

    jitter: tuple[float, float] = parameter((0.8, 1.1), "factor on one map of the system; 1,1 to disable", 0.0, 10.0)
    window_shift: float = parameter(0.2, "largest shift of the window, as a share of the extent", 0.0, 10.0)
    window_scale: tuple[float, float] = parameter(
        (0.5, 2.0), "factor on the extent of the window; 1,1 to disable", 0.01, 100.0
    )


def render(params: SingleParams, size: int, points: int, unit: Unit, systems: Systems) -> tuple[Rendered]:
    """Render one image, (size, size, 3) uint8, in the published order of steps."""
    rng = Stream.of("single", *unit.identity())
    system = jitter(systems[unit.label], params.jitter, rng)
    xs, ys = chaos_game(system, points, rng.key())
    window = _draw_window(bounding_box(xs, ys), params, rng)
    patch = anderson.draw_patch(params, rng)
    counts = splat(xs, ys, size, window, patch, anderson.draw_orientation(params, rng))
    colors = anderson.draw_fractal_colors(params, rng)
    image = paint(counts, colors, *anderson.draw_background(params, size, rng))
    return ((anderson.blur_at_random(image, params, rng), unit.label),)


def jitter(system: npt.NDArray[np.float64], factors: tuple[float, float], rng: Stream) -> npt.NDArray[np.float64]:
    """Scale one random map of a system; tries up to four times to keep all singular values at most 1."""
    for _ in range(_JITTER_TRIES):
        k = rng.integer(0, len(system))
        jittered = system.copy()
        jittered[k] *= rng.uniform(*factors)
        if max(map(_largest_singular_value, jittered)) <= 1:
            return jittered
    return system


def _largest_singular_value(affine: npt.NDArray[np.float64]) -> float:
    """The largest singular value of a (2, 3) map, in closed form: sqrt is exact on all machines, LAPACK is not."""
    (a, b, _), (c, d, _) = affine.tolist()
    total = a * a + b * b + c * c + d * d
    determinant = a * d - b * c
    spread = math.sqrt(max(total * total - 4 * determinant * determinant, 0.0))
    return math.sqrt((total + spread) / 2)


def _draw_window(box: Window, params: SingleParams, rng: Stream) -> Window:
    """Shift the centre and scale the extent of the bounding box, each axis independently."""
    edges = []
    for low, high in ((box[0], box[2]), (box[1], box[3])):
        centre = (low + high) / 2 + (high - low) * rng.uniform(-params.window_shift, params.window_shift)
        half = (high - low) * rng.uniform(*params.window_scale) / 2
        edges.append((centre - half, centre + half))
    (xmin, xmax), (ymin, ymax) = edges
    return xmin, ymin, xmax, ymax


KIND = Kind(
    name="single",
    summary="one coloured fractal on a noise background (Anderson & Farrell 2022)",
    params=SingleParams,
    size=224,
    points=100_000,
    draw_systems=anderson.draw_systems,
    render=render,
)
