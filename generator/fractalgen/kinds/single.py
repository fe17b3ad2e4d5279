"""Kind ``single``: one coloured fractal on a diamond-square background (Anderson & Farrell, WACV 2022).

fractalgen build --kind single --n 1000000
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fractalgen.background import BLACK, HeightColors, Heights, diamond_square, draw_height_colors
from fractalgen.color import Pixels
from fractalgen.ifs import SIGMA_FACTOR, sample_system
from fractalgen.orbit import chaos_game
from fractalgen.paint import FractalColors, gaussian_blur, paint
from fractalgen.raster import POINT, Orientation, Window, bounding_box, splat
from fractalgen.rng import Stream
from fractalshards.errors import UsageError

_GRID = 2.0**24  # systems are rounded to multiples of 1 / _GRID, so that every machine stores the same
_JITTER_TRIES = 4


def _parameter(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class SingleParams:
    """What the paper varies, with its values as defaults; pairs are (low, high) of a uniform distribution."""

    maps: tuple[int, int] = _parameter((2, 4), "number of maps of a system, both ends included")
    sigma_factor: tuple[float, float] = _parameter(
        SIGMA_FACTOR, "a, b: the singular values' weighted sum is U((a + maps) / 2, (b + maps) / 2)"
    )
    jitter: tuple[float, float] = _parameter((0.8, 1.1), "factor on one map of the system; 1,1 for none")
    window_shift: float = _parameter(0.2, "centre of the window moves by up to this share of the extent")
    window_scale: tuple[float, float] = _parameter((0.5, 2.0), "factor on the extent of the window; 1,1 for none")
    patch: bool = _parameter(True, "draw every point as one random 3 x 3 patch per image, else as a pixel")
    flips: bool = _parameter(True, "transpose and mirror at random")
    color: bool = _parameter(True, "colour the fractal by how often a pixel is hit, else grey 127")
    saturation: tuple[float, float] = _parameter((0.3, 1.0), "saturation of the fractal, 0..1")
    value: tuple[float, float] = _parameter((0.5, 1.0), "value (brightness) of the fractal, 0..1")
    background: bool = _parameter(True, "diamond-square noise behind the fractal, else black")
    decay: tuple[float, float] = _parameter((0.4, 0.8), "how fast the background's detail loses amplitude")
    blur_probability: float = _parameter(0.5, "share of images that are blurred")
    blur_sigma: tuple[float, float] = _parameter((0.5, 1.0), "sigma of the 3 x 3 Gaussian blur in pixels")

    def __post_init__(self) -> None:
        _check_range("maps", self.maps, 2, 255)
        _check_range("sigma_factor", self.sigma_factor, 0.0, 6.0)
        _check_range("jitter", self.jitter, 0.0, 10.0)
        _check_number("window_shift", self.window_shift, 0.0, 10.0)
        _check_range("window_scale", self.window_scale, 0.01, 100.0)
        _check_range("saturation", self.saturation, 0.0, 1.0)
        _check_range("value", self.value, 0.0, 1.0)
        _check_range("decay", self.decay, 0.0, 10.0)
        _check_number("blur_probability", self.blur_probability, 0.0, 1.0)
        _check_range("blur_sigma", self.blur_sigma, 0.05, 10.0)


def draw_system(params: SingleParams, seed: int, label: int) -> npt.NDArray[np.float64]:
    """The system of a class: (maps, 2, 3) float64, multiples of 2**-24."""
    rng = np.random.default_rng([seed, label])
    low, high = params.maps
    system = sample_system((low, high + 1), rng, params.sigma_factor)
    return np.round(system * _GRID) / _GRID


def render(
    params: SingleParams,
    size: int,
    points: int,
    identity: tuple[str | int, ...],
    system: npt.NDArray[np.float64],
) -> Pixels:
    """Render one image, (size, size, 3) uint8, by the published steps in their order."""
    rng = Stream.of("single", *identity)
    jittered = jitter(system, params.jitter, rng)
    xs, ys = chaos_game(jittered, points, rng.key())
    window = _draw_window(bounding_box(xs, ys), params, rng)
    patch = _draw_patch(rng) if params.patch else POINT
    orientation = Orientation(*(rng.chance(0.5) for _ in range(3))) if params.flips else Orientation()
    counts = splat(xs, ys, size, window, patch, orientation)
    colors = _draw_fractal_colors(params, rng)
    image = paint(counts, colors, *_draw_background(params, size, rng))
    if rng.chance(params.blur_probability):
        image = gaussian_blur(image, rng.uniform(*params.blur_sigma))
    return image


def jitter(system: npt.NDArray[np.float64], factors: tuple[float, float], rng: Stream) -> npt.NDArray[np.float64]:
    """Scale one random map of a system; if a singular value exceeds 1, try again, four times at most, else leave it."""
    for _ in range(_JITTER_TRIES):
        k = rng.integer(0, len(system))
        jittered = system.copy()
        jittered[k] *= rng.uniform(*factors)
        if max(map(_largest_singular_value, jittered)) <= 1:
            return jittered
    return system


def _largest_singular_value(affine: npt.NDArray[np.float64]) -> float:
    """Of the linear part of a (2, 3) map, in closed form: sqrt is exact on every machine, LAPACK is not."""
    (a, b, _), (c, d, _) = affine.tolist()
    total = a * a + b * b + c * c + d * d
    determinant = a * d - b * c
    spread = math.sqrt(max(total * total - 4 * determinant * determinant, 0.0))
    return math.sqrt((total + spread) / 2)


def _draw_window(box: Window, params: SingleParams, rng: Stream) -> Window:
    """The bounding box, its centre moved and its extent scaled, each axis on its own."""
    edges = []
    for low, high in ((box[0], box[2]), (box[1], box[3])):
        centre = (low + high) / 2 + (high - low) * rng.uniform(-params.window_shift, params.window_shift)
        half = (high - low) * rng.uniform(*params.window_scale) / 2
        edges.append((centre - half, centre + half))
    (xmin, xmax), (ymin, ymax) = edges
    return xmin, ymin, xmax, ymax


def _draw_patch(rng: Stream) -> npt.NDArray[np.int64]:
    """A random patch that is not empty: the cells of the bits of 1..511, as (k, 2)."""
    mask = rng.integer(1, 512)
    return np.array([divmod(bit, 3) for bit in range(9) if mask >> bit & 1])


def _draw_fractal_colors(params: SingleParams, rng: Stream) -> FractalColors:
    shift, saturation, value = rng.uniform(0.0, 255.0), rng.uniform(*params.saturation), rng.uniform(*params.value)
    if not params.color:
        return FractalColors(0.0, 0, 127)
    return FractalColors(shift, int(255 * saturation), int(255 * value))


def _draw_background(params: SingleParams, size: int, rng: Stream) -> tuple[Heights, HeightColors]:
    heights = diamond_square(size, rng.uniform(*params.decay), rng.key())
    colors = draw_height_colors(rng)
    return heights, colors if params.background else BLACK


def _check_range(name: str, pair: tuple[float, float], low: float, high: float) -> None:
    if not low <= pair[0] <= pair[1] <= high:
        raise UsageError(f"{name} is {pair[0]},{pair[1]}: expected {low} <= low <= high <= {high}")


def _check_number(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UsageError(f"{name} is {value}: expected {low} to {high}")
