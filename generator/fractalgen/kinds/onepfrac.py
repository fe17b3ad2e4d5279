"""Kind ``onepfrac``: 1p-frac, one fractal and a thousand perturbations of it (Nakamura et al., ECCV 2024).

fractalgen build --kind onepfrac
"""

from dataclasses import dataclass

import numpy as np

from fractalgen.kernels import fractaldb as kernel
from fractalgen.kernels.random import Stream
from fractalgen.kinds.anderson import Float64s, rounded, sample_system
from fractalgen.kinds.kind import Kind, Unit, check_parameters, parameter
from fractalshards.errors import UsageError
from fractalshards.png import Indexed
from fractalshards.systems import Systems
from fractalshards.writer import Rendered

_SIZE, _POINTS = 512, 100_000
_SIGMA_SPREAD = 0.1
_TRIES = 1000
_DRAW: kernel.Draw = "patch-gray"


@dataclass(frozen=True)
class OnepfracParams:
    """Parameters with the published values as defaults."""

    maps: int = parameter(2, "number of maps of the fractal", 2, 8)
    sigma: float = parameter(3.5, "weighted sum of its singular values, sum(s1 + 2 s2), within 0.1", 0.2, 24.0)
    delta: float = parameter(0.1, "a class multiplies each coefficient by U(1 - delta, 1 + delta)", 0.0, 1.0)
    threshold: float = parameter(0.05, "share of pixels that the image of a class must exceed", 0.0, 0.9)

    def __post_init__(self) -> None:
        check_parameters(self)
        if self.sigma + _SIGMA_SPREAD > 3 * self.maps:
            raise UsageError(f"sigma is {self.sigma}: {self.maps} contracting maps reach at most {3 * self.maps - 0.1}")


def draw_systems(params: OnepfracParams, seed: int, classes: int) -> Systems:
    """Draw the fractal, and the perturbation of every class: (maps, 7) float64, a b c d e f p.

    Coefficients are multiples of 2**-24. A perturbation is drawn again until its image of 512 x 512 pixels, with the
    masks of its first training image, fills more than the threshold. Raises UsageError if a class finds none in a
    thousand tries.
    """
    fractal = _draw_fractal(params, seed)
    return tuple(_perturb(fractal, params, seed, label) for label in range(classes))


def _draw_fractal(params: OnepfracParams, seed: int) -> Float64s:
    """Draw the unperturbed system; the probability of a map is proportional to |det A|."""
    low, high = (2 * (params.sigma + spread) - params.maps for spread in (-_SIGMA_SPREAD, _SIGMA_SPREAD))
    affine = rounded(sample_system(params.maps, np.random.default_rng([seed]), (low, high)))  # it adds maps and halves
    a, b, e, c, d, f = affine.reshape(-1, 6).T
    area = np.abs(a * d - b * c)
    return np.stack([a, b, c, d, e, f, area / area.sum()], axis=1)


def _perturb(fractal: Float64s, params: OnepfracParams, seed: int, label: int) -> Float64s:
    masks = _masks(Unit(seed, "train", label, 0), _POINTS)
    for attempt in range(_TRIES):
        rng = np.random.default_rng([seed, label, attempt])
        system = fractal.copy()
        system[:, :6] = rounded(fractal[:, :6] * rng.uniform(1 - params.delta, 1 + params.delta, (len(fractal), 6)))
        image = kernel.render(system, np.ones(6), _SIZE, _POINTS, _DRAW, masks)
        if np.count_nonzero(image) > params.threshold * image.size:
            return system
    raise UsageError(f"class {label}: none of {_TRIES} systems exceeds 'threshold'; lower it, or change --seed")


def render(params: OnepfracParams, size: int, points: int, unit: Unit, systems: Systems) -> tuple[Rendered]:
    """Render one image, (size, size) indexed; further images of a class have other patches."""
    indices = kernel.render(systems[unit.label], np.ones(6), size, points, _DRAW, _masks(unit, points))
    return ((Indexed(indices, kernel.palette(_DRAW)), unit.label),)


def _masks(unit: Unit, points: int) -> kernel.Masks:
    return kernel.masks(Stream.of("onepfrac", *unit.identity()).key(), points)


KIND = Kind(
    name="onepfrac",
    summary="one fractal and small perturbations of it, grey on black (1p-frac, Nakamura et al. 2024)",
    params=OnepfracParams,
    size=_SIZE,
    points=_POINTS,
    draw_systems=draw_systems,
    render=render,
    map_shape=(7,),
    n=1000,
)
