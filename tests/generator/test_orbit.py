"""The chaos game: right probabilities, right attractor, the same points whatever their number."""

import numpy as np
import pytest

from fractalgen.kernels.chaos_game import chaos_game, determinants, fixed_point
from fractalgen.kernels.random import Stream
from fractalgen.kernels.raster import Orientation, bounding_box, splat
from fractalgen.kinds.anderson import rasterize, sample_system

KEY = Stream.of("orbit").key()


def published_orbit(system: np.ndarray, points: int, rng: np.random.Generator) -> np.ndarray:
    """One orbit in float64, as the published code iterates it."""
    shares = np.cumsum(determinants(system) / determinants(system).sum())
    choices = np.searchsorted(shares, rng.random(points), side="right").clip(max=len(system) - 1)
    point = np.array(fixed_point(system[0]))
    orbit = np.empty((points, 2))
    for i, k in enumerate(choices):
        orbit[i] = point = system[k, :, :2] @ point + system[k, :, 2]
    return orbit


def test_maps_are_chosen_by_their_determinants() -> None:
    shares = np.array([0.6, 0.3, 0.099997, 0.000003])
    system = np.zeros((4, 2, 3))
    system[:, 0, 0] = shares
    system[:, 1, 1] = 0.01
    system[:, 1, 2] = [0, 1, 2, 3]  # so that y tells which map a point came from
    _, ys = chaos_game(system, 1_000_000, KEY)
    hits = np.bincount(ys.astype(int), minlength=4)
    assert np.all(np.abs(hits - shares * 1e6) < 5 * np.sqrt(shares * 1e6))
    assert hits[3] > 0


@pytest.mark.parametrize("seed", range(4))
def test_densities_are_those_of_one_long_orbit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    system = sample_system((2, 5), rng)
    theirs = published_orbit(system, 100_000, rng)
    box = [*theirs.min(0), *theirs.max(0)]
    ours = np.stack(chaos_game(system, 100_000, KEY), 1).astype(np.float64)
    again = published_orbit(system, 100_000, rng)
    density, other, repeat = (rasterize(points, 24, window=box) for points in (theirs, ours, again))
    noise = np.abs(density - repeat).mean()
    assert np.abs(density - other).mean() < 1.5 * noise + 1e-3


def test_points_do_not_depend_on_how_many_are_asked_for() -> None:
    system = sample_system(3, np.random.default_rng(0))
    xs, ys = chaos_game(system, 1000, KEY)
    for count in (1, 2, 15, 16, 17, 999):
        fewer_xs, fewer_ys = chaos_game(system, count, KEY)
        assert len(fewer_xs) == count
        assert np.array_equal(fewer_xs, xs[:count])
        assert np.array_equal(fewer_ys, ys[:count])


def test_the_way_from_the_start_is_kept_and_walked_once() -> None:
    system = sample_system(4, np.random.default_rng(1))
    system[0, :, 2] += 40  # map 0 alone leads far out, and is drawn one time in five hundred
    system[0, :, :2] *= 0.05 / np.sqrt(determinants(system)[0] / determinants(system)[1:].sum())
    points = np.stack(chaos_game(system, 1000, KEY), 1).astype(np.float64)
    before = np.concatenate([[fixed_point(system[0])], points[:255]])
    steps = np.einsum("kij,nj->nki", system[:, :, :2], before) + system[:, :, 2]
    assert np.all(np.abs(steps - points[:256, None]).sum(2).min(1) < 1e-3)
    assert not any(np.abs(points[i] - points[0]).sum() < 1e-3 for i in range(1, 1000))


def test_fixed_points_stay_in_place() -> None:
    system = sample_system(3, np.random.default_rng(5))
    x, y = fixed_point(system[0])
    alone = chaos_game(system[:1], 100, KEY)
    np.testing.assert_allclose(alone, np.array([[x] * 100, [y] * 100]), rtol=1e-5)
    np.testing.assert_allclose(system[0, :, :2] @ [x, y] + system[0, :, 2], [x, y], atol=1e-12)
    assert fixed_point(np.array([[1.0, 0, 1], [0, 1, 1]])) == (0.0, 0.0)


def test_degenerate_systems_neither_hang_nor_crash() -> None:
    singular = np.zeros((3, 2, 3))
    singular[:, 0, 2] = [1, 2, 3]
    xs, ys = chaos_game(singular, 3000, KEY)
    assert sorted(np.unique(xs)) == [1, 2, 3]
    assert np.all(np.bincount(xs.astype(int))[1:] > 900)
    exploding = np.tile(np.array([[3.0, 1, 1], [1, 3, 1]]), (2, 1, 1))
    xs, ys = chaos_game(exploding, 1000, KEY)
    assert splat(xs, ys, 16, bounding_box(xs, ys)).shape == (16, 16)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_orientation_is_that_of_the_finished_image(transpose: bool, rows: bool, columns: bool) -> None:
    rng = np.random.default_rng(0)
    xs, ys = rng.uniform(-0.2, 1.2, (2, 5000))
    plain = splat(xs, ys, 20, (0, 0, 1, 1))
    expected = plain.T if transpose else plain
    expected = expected[::-1] if rows else expected
    expected = expected[:, ::-1] if columns else expected
    assert np.array_equal(splat(xs, ys, 20, (0, 0, 1, 1), orientation=Orientation(transpose, rows, columns)), expected)


def test_float32_and_float64_points_fall_into_the_same_pixels() -> None:
    xs, ys = np.random.default_rng(0).integers(0, 64, (2, 4000)) / 64 + 1 / 128
    in_float64 = splat(xs, ys, 33, (0, 0, 1, 1))
    assert np.array_equal(splat(xs.astype(np.float32), ys.astype(np.float32), 33, (0, 0, 1, 1)), in_float64)
    assert in_float64.sum() == 4000
