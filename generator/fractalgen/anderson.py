"""What the kinds of Anderson & Farrell (WACV 2022) share: their parameters, and the random choices of one fractal."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fractalgen.background import BLACK, HeightColors, Heights, diamond_square, draw_height_colors
from fractalgen.color import Pixels
from fractalgen.ifs import SIGMA_FACTOR, sample_system
from fractalgen.limits import MAX_MAPS
from fractalgen.paint import FractalColors, gaussian_blur
from fractalgen.params import check_parameters, parameter
from fractalgen.raster import POINT, Orientation
from fractalgen.rng import Stream
from fractalshards.systems import Systems

_GRID = 2.0**24  # systems are rounded to multiples of 1 / _GRID, so that every machine stores the same


@dataclass(frozen=True)
class AndersonParams:
    """What the paper varies in both kinds, with its values as defaults; pairs bound a uniform distribution."""

    maps: tuple[int, int] = parameter((2, 4), "number of maps of a system, both ends included", 2, MAX_MAPS)
    sigma_factor: tuple[float, float] = parameter(
        SIGMA_FACTOR, "a, b: the singular values' weighted sum is U((a + maps) / 2, (b + maps) / 2)", 0.0, 6.0
    )
    patch: bool = parameter(True, "draw every point as one random 3 x 3 patch per fractal, else as a pixel")
    flips: bool = parameter(True, "transpose and mirror at random")
    color: bool = parameter(True, "colour the fractal by how often a pixel is hit, else grey 127")
    saturation: tuple[float, float] = parameter((0.3, 1.0), "saturation of a fractal", 0.0, 1.0)
    value: tuple[float, float] = parameter((0.5, 1.0), "value (brightness) of a fractal", 0.0, 1.0)
    background: bool = parameter(True, "diamond-square noise behind the fractal, else black")
    decay: tuple[float, float] = parameter((0.4, 0.8), "how fast the background's detail loses amplitude", 0.0, 10.0)
    blur_probability: float = parameter(0.5, "share of images that are blurred", 0.0, 1.0)
    blur_sigma: tuple[float, float] = parameter((0.5, 1.0), "sigma of the 3 x 3 Gaussian blur in pixels", 0.05, 10.0)

    def __post_init__(self) -> None:
        check_parameters(self)


def draw_systems(params: AndersonParams, seed: int, classes: int) -> Systems:
    """The systems of all classes, each (maps, 2, 3) float64, multiples of 2**-24; a class's own is always the same."""
    return tuple(_draw_system(params, np.random.default_rng([seed, label])) for label in range(classes))


def draw_patch(params: AndersonParams, rng: Stream) -> npt.NDArray[np.int64]:
    """A random patch that is not empty: the cells of the bits of 1..511, as (k, 2); or a single pixel."""
    if not params.patch:
        return POINT
    mask = rng.integer(1, 512)
    return np.array([divmod(bit, 3) for bit in range(9) if mask >> bit & 1])


def draw_orientation(params: AndersonParams, rng: Stream) -> Orientation:
    """Transposed and mirrored each way with probability 1/2."""
    return Orientation(*(rng.chance(0.5) for _ in range(3))) if params.flips else Orientation()


def draw_fractal_colors(params: AndersonParams, rng: Stream) -> FractalColors:
    """Hue shift, saturation and value of one fractal."""
    shift, saturation, value = rng.uniform(0.0, 255.0), rng.uniform(*params.saturation), rng.uniform(*params.value)
    if not params.color:
        return FractalColors(0.0, 0, 127)
    return FractalColors(shift, int(255 * saturation), int(255 * value))


def draw_background(params: AndersonParams, size: int, rng: Stream) -> tuple[Heights, HeightColors]:
    """Heights (size, size) float32 and how they are coloured."""
    heights = diamond_square(size, rng.uniform(*params.decay), rng.key())
    colors = draw_height_colors(rng)
    return heights, colors if params.background else BLACK


def blur_at_random(image: Pixels, params: AndersonParams, rng: Stream) -> Pixels:
    """The image (H, W, 3) uint8, blurred or as it is."""
    if rng.chance(params.blur_probability):
        return gaussian_blur(image, rng.uniform(*params.blur_sigma))
    return image


def _draw_system(params: AndersonParams, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    low, high = params.maps
    system = sample_system((low, high + 1), rng, params.sigma_factor)
    return np.round(system * _GRID) / _GRID
