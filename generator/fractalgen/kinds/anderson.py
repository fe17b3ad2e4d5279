"""Shared by ``single`` and ``multi``: parameters and random draws of Anderson & Farrell (WACV 2022)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fractalgen.kernels import MAX_MAPS
from fractalgen.kernels.paint import BLACK, FractalColors, HeightColors, Heights, diamond_square, gaussian_blur
from fractalgen.kernels.random import Stream
from fractalgen.kernels.raster import POINT, Orientation, Patch
from fractalgen.kinds.kind import check_parameters, parameter
from fractalshards.errors import UsageError
from fractalshards.png import Pixels
from fractalshards.systems import Systems

Float64s = npt.NDArray[np.float64]

SIGMA_FACTOR = (5.0, 6.0)


def sample_system(
    n: int | tuple[int, int], rng: np.random.Generator, sigma_factor: tuple[float, float] = SIGMA_FACTOR
) -> Float64s:
    """Draw a contractive IFS (Anderson & Farrell 2022, section 3.2).

    Every map is A = U diag(s) V, where U and V are random rotations times random signs on the axes; the singular values
    sum to the sigma factor alpha = sum(s1 + 2 s2). Draws are in the published order, so that the same generator gives
    the same system. Raises UsageError if n is less than 2, for which the sigma factor cannot be reached.

    Args:
        n: number of maps, or a half-open range (low, high) from which it is drawn first.
        rng: generator to draw from.
        sigma_factor: (low, high); alpha is uniform in ((low + n) / 2, (high + n) / 2).

    Returns:
        (n, 2, 3) float64: the linear part in [..., :2], with singular values in [0, 1], and the translation, uniform
        in [-1, 1), in [..., 2].
    """
    maps = int(n) if isinstance(n, int | np.integer) else int(rng.integers(*n))
    if maps < 2:
        raise UsageError(f"{maps} maps: the singular values of a system are drawn for at least 2")
    signs = np.sign(rng.random((2 * maps, 2, 1)) - 0.5) * np.eye(2)
    angles = rng.uniform(-np.pi, np.pi, 2 * maps)
    sine, cosine = np.sin(angles), np.cos(angles)
    rotations = np.stack([np.stack([cosine, -sine], 1), np.stack([sine, cosine], 1)], 1)
    frames = rotations @ signs
    alpha = rng.uniform((sigma_factor[0] + maps) / 2, (sigma_factor[1] + maps) / 2)
    values = _sample_singular_values(maps, alpha, rng)
    system = np.empty((maps, 2, 3))
    system[:, :, :2] = frames[:maps] * values[:, None, :] @ frames[maps:]
    system[:, :, 2] = rng.uniform(-1, 1, (maps, 2))
    return system


def _sample_singular_values(n: int, alpha: float, rng: np.random.Generator) -> Float64s:
    """Draw n pairs s1 >= s2 in [0, 1] with sum(s1 + 2 s2) = alpha (Anderson & Farrell 2022, algorithm 1)."""
    values = np.empty((n, 2))
    above, below = alpha, alpha - 3 * n + 3
    for i in range(n - 1):
        first = rng.uniform(max(0, below / 3), min(1, above))
        below -= first
        above -= first
        second = rng.uniform(max(0, below / 2), min(first, above / 2))
        below += 3 - 2 * second
        above -= 2 * second
        values[i] = first, second
    second = rng.uniform(max(0, (above - 1) / 2), above / 3)
    values[-1] = above - 2 * second, second
    return values


_GRID = 2.0**24


def rounded(values: Float64s) -> Float64s:
    """Round to multiples of 2**-24, so that all machines store the same systems."""
    multiples: Float64s = np.round(values * _GRID) / _GRID
    return multiples


@dataclass(frozen=True)
class AndersonParams:
    """Parameters of both kinds, with the published values as defaults; pairs bound a uniform distribution."""

    maps: tuple[int, int] = parameter((2, 4), "number of maps of a system, inclusive", 2, MAX_MAPS)
    sigma_factor: tuple[float, float] = parameter(
        SIGMA_FACTOR, "a,b: the weighted sum of singular values is U((a + maps) / 2, (b + maps) / 2)", 0.0, 6.0
    )
    patch: bool = parameter(True, "draw points as a 3 x 3 patch, random per fractal, else as pixels")
    flips: bool = parameter(True, "transpose and mirror at random")
    color: bool = parameter(True, "colour the fractal by hits per pixel, else grey 127")
    saturation: tuple[float, float] = parameter((0.3, 1.0), "saturation of a fractal", 0.0, 1.0)
    value: tuple[float, float] = parameter((0.5, 1.0), "value (brightness) of a fractal", 0.0, 1.0)
    background: bool = parameter(True, "diamond-square noise behind the fractal, else black")
    decay: tuple[float, float] = parameter((0.4, 0.8), "how fast the background's detail loses amplitude", 0.0, 10.0)
    blur_probability: float = parameter(0.5, "share of images that are blurred", 0.0, 1.0)
    blur_sigma: tuple[float, float] = parameter((0.5, 1.0), "sigma of the 3 x 3 Gaussian blur in pixels", 0.05, 10.0)

    def __post_init__(self) -> None:
        check_parameters(self)


def draw_systems(params: AndersonParams, seed: int, classes: int) -> Systems:
    """Draw a system per class, (maps, 2, 3) float64 in multiples of 2**-24, whatever the number of classes."""
    low, high = params.maps
    rngs = (np.random.default_rng([seed, label]) for label in range(classes))
    return tuple(rounded(sample_system((low, high + 1), rng, params.sigma_factor)) for rng in rngs)


def draw_patch(params: AndersonParams, rng: Stream) -> Patch:
    """Draw a patch, (k, 2) cells: the bits of a number in 1..511, or a single pixel without ``params.patch``."""
    if not params.patch:
        return POINT
    mask = rng.integer(1, 512)
    return np.array([divmod(bit, 3) for bit in range(9) if mask >> bit & 1])


def draw_orientation(params: AndersonParams, rng: Stream) -> Orientation:
    """Draw an orientation: transposed and mirrored each way with probability 1/2."""
    return Orientation(*(rng.chance(0.5) for _ in range(3))) if params.flips else Orientation()


def draw_fractal_colors(params: AndersonParams, rng: Stream) -> FractalColors:
    """Draw hue shift, saturation and value of one fractal."""
    shift, saturation, value = rng.uniform(0.0, 255.0), rng.uniform(*params.saturation), rng.uniform(*params.value)
    if not params.color:
        return FractalColors(0.0, 0, 127)
    return FractalColors(shift, int(255 * saturation), int(255 * value))


def draw_background(params: AndersonParams, size: int, rng: Stream) -> tuple[Heights, HeightColors]:
    """Draw a background: heights (size, size) float32 and their colours, from the published ranges."""
    heights = diamond_square(size, rng.uniform(*params.decay), rng.key())
    colors = HeightColors(
        hue=(255 * rng.uniform(0.25, 1.0), 255 * rng.uniform(0.0, 1.0)),
        saturation=(255 * rng.uniform(0.1, 0.3), 255 * rng.uniform(0.4, 0.6)),
        value=(255 * rng.uniform(0.3, 0.6), 255 * rng.uniform(0.4, 0.6)),
    )
    return heights, colors if params.background else BLACK


def blur_at_random(image: Pixels, params: AndersonParams, rng: Stream) -> Pixels:
    """Blur an image (H, W, 3) uint8 with probability ``params.blur_probability``."""
    if rng.chance(params.blur_probability):
        return gaussian_blur(image, rng.uniform(*params.blur_sigma))
    return image
