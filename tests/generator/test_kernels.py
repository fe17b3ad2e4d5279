"""Kernels shared by the kinds: random numbers, chaos game, rasteriser, resizing and pasting."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from fractalgen.kernels.chaos_game import chaos_game, determinants, fixed_point
from fractalgen.kernels.compose import Canvas, resize
from fractalgen.kernels.random import Stream, hash32
from fractalgen.kernels.raster import POINT, Orientation, bounding_box, peak_of, splat
from fractalgen.kinds.anderson import sample_system

KEY = Stream.of("orbit").key()


@njit
def words(count, key0, key1):
    out = np.empty(count, np.uint32)
    for i in range(count):
        out[i] = hash32(np.uint32(i), key0, key1)
    return out


def chi_square(values: np.ndarray, bins: int) -> float:
    counts = np.bincount(values, minlength=bins)
    return float(((counts - len(values) / bins) ** 2 / (len(values) / bins)).sum())


def test_random_numbers_are_pinned() -> None:
    """Changing them would change every dataset."""
    stream = Stream.of("single", 0, "train", 3, 4)
    assert [stream.bits64() for _ in range(2)] == [5537430552962344589, 14549906094821892492]
    assert words(3, np.uint32(1), np.uint32(2)).tolist() == [1159414821, 2502442532, 2018336093]


def test_hash32_is_uniform_and_independent() -> None:
    """Each statistic has 255 degrees of freedom: mean 255, standard deviation 22.6."""
    for trial in range(20):
        drawn = words(1 << 18, *Stream.of("trial", trial).key())
        high = drawn >> 28
        for values in (drawn >> 24, drawn & 255, high[:-1] * 16 + high[1:], high[:-16] * 16 + high[16:]):
            assert 150 < chi_square(values, 256) < 380


def rasterize(
    points: np.ndarray,
    size: int,
    window: np.ndarray | list[float] | None = None,
    patch: np.ndarray = POINT,
    graded: bool = True,
) -> np.ndarray:
    """The published interface on ``splat``: points (n, 2), x selecting the row, to counts / maximum, or 0 and 1."""
    xs, ys = np.ascontiguousarray(points[:, 0]), np.ascontiguousarray(points[:, 1])
    xmin, ymin, xmax, ymax = np.asarray(bounding_box(xs, ys) if window is None else window, np.float64).tolist()
    counts = splat(xs, ys, size, (xmin, ymin, xmax, ymax), np.asarray(patch, np.int64).reshape(-1, 2))
    return counts / peak_of(counts) if graded else (counts > 0).astype(np.uint8)


def published_orbit(system: np.ndarray, points: int, rng: np.random.Generator) -> np.ndarray:
    """Iterate one orbit in float64, as the published code does."""
    shares = np.cumsum(determinants(system) / determinants(system).sum())
    choices = np.searchsorted(shares, rng.random(points), side="right").clip(max=len(system) - 1)
    point = np.array(fixed_point(system[0]))
    orbit = np.empty((points, 2))
    for i, k in enumerate(choices):
        orbit[i] = point = system[k, :, :2] @ point + system[k, :, 2]
    return orbit


def test_chaos_game_chooses_maps_by_their_determinants() -> None:
    shares = np.array([0.6, 0.3, 0.099997, 0.000003])
    system = np.zeros((4, 2, 3))
    system[:, 0, 0] = shares
    system[:, 1, 1] = 0.01
    system[:, 1, 2] = [0, 1, 2, 3]  # y identifies the map that a point came from
    _, ys = chaos_game(system, 1_000_000, KEY)
    hits = np.bincount(ys.astype(int), minlength=4)
    assert np.all(np.abs(hits - shares * 1e6) < 5 * np.sqrt(shares * 1e6))
    assert hits[3] > 0


@pytest.mark.parametrize("seed", range(4))
def test_chaos_game_has_the_density_of_one_long_orbit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    system = sample_system((2, 5), rng)
    theirs = published_orbit(system, 100_000, rng)
    box = [*theirs.min(0), *theirs.max(0)]
    ours = np.stack(chaos_game(system, 100_000, KEY), 1).astype(np.float64)
    again = published_orbit(system, 100_000, rng)
    density, other, repeat = (rasterize(points, 24, window=box) for points in (theirs, ours, again))
    noise = np.abs(density - repeat).mean()
    assert np.abs(density - other).mean() < 1.5 * noise + 1e-3


def test_chaos_game_points_do_not_depend_on_their_number() -> None:
    system = sample_system(3, np.random.default_rng(0))
    xs, ys = chaos_game(system, 1000, KEY)
    for count in (1, 2, 15, 16, 17, 999):
        assert np.array_equal(chaos_game(system, count, KEY), [xs[:count], ys[:count]])


def test_fixed_point_stays_in_place() -> None:
    system = sample_system(3, np.random.default_rng(5))
    x, y = fixed_point(system[0])
    np.testing.assert_allclose(chaos_game(system[:1], 100, KEY), [[x] * 100, [y] * 100], rtol=1e-5)
    np.testing.assert_allclose(system[0, :, :2] @ [x, y] + system[0, :, 2], [x, y], atol=1e-12)
    assert fixed_point(np.array([[1.0, 0, 1], [0, 1, 1]])) == (0.0, 0.0)


def test_splat_equals_the_published_rasteriser(reference: Path) -> None:
    with np.load(reference / "published_single" / "render.npz") as arrays:
        renders = {name: arrays[name] for name in arrays.files}
    cases = {name.split("_")[0] for name in renders}
    assert cases
    for case in cases:
        points, patch, window = (renders[f"{case}_{part}"] for part in ("coords", "patch", "region"))
        for image, options in (
            ("graded_full", {"patch": patch}),
            ("graded_window", {"patch": patch, "window": window}),
            ("graded_point", {}),
            ("binary_patch", {"patch": patch, "graded": False}),
        ):
            ours = rasterize(points, 64, **options)
            np.testing.assert_allclose(ours, renders[f"{case}_{image}"], rtol=0, atol=1e-12, err_msg=f"{case} {image}")


def test_splat_draws_patches_of_points_just_outside() -> None:
    points = np.array([[-1.5, 3.0], [3.0, 8.4], [-2.5, 3.0], [np.nan, 1.0], [np.inf, 1.0], [3.0, 1e30]])
    counts = rasterize(points, 8, window=[0, 0, 7, 7], patch=np.array([[2, 1], [1, 0]]), graded=False)
    assert np.argwhere(counts).tolist() == [[0, 3], [3, 7]]
    assert not rasterize(points, 8, window=[0, 0, 7, 7], patch=np.zeros((0, 2))).any()
    assert np.argwhere(rasterize(np.full((10, 2), 0.25), 16)).tolist() == [[0, 0]]  # no extent


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_splat_orients_the_finished_image(transpose: bool, rows: bool, columns: bool) -> None:
    rng = np.random.default_rng(0)
    xs, ys = rng.uniform(-0.2, 1.2, (2, 5000))
    plain = splat(xs, ys, 20, (0, 0, 1, 1))
    expected = plain.T if transpose else plain
    expected = expected[::-1] if rows else expected
    expected = expected[:, ::-1] if columns else expected
    assert np.array_equal(splat(xs, ys, 20, (0, 0, 1, 1), orientation=Orientation(transpose, rows, columns)), expected)


def picture(side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize("source", [1, 2, 8, 111, 112, 256])
def test_resize_equals_opencv(source: int) -> None:
    image = picture(source)
    for size in [*range(1, 140), 224, 300]:
        assert np.array_equal(resize(image, size), cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR))


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(-35, 35), st.integers(-35, 35)), max_size=6))
def test_canvas_boxes_what_is_visible_of_each_object(pastes: list[tuple[int, int, int]]) -> None:
    canvas = Canvas.of(np.full((20, 20, 3), 200, np.uint8))
    expected = np.full((20, 20, 3), 200, np.uint8)
    owner = np.zeros((20, 20), int)
    for number, (side, x, y) in enumerate(pastes, 1):
        pixels = picture(side, number)
        pixels[picture(side, number + 99)[..., 0] < 128] = 0
        canvas.paste(pixels, x, y)
        for row, column in np.argwhere(pixels.any(-1)).tolist():
            if 0 <= y + row < 20 and 0 <= x + column < 20:
                expected[y + row, x + column] = pixels[row, column]
                owner[y + row, x + column] = number
    assert np.array_equal(canvas.image, expected)
    for number, box in enumerate(canvas.visible_boxes(), 1):
        rows, columns = np.nonzero(owner == number)
        if box is None:
            assert len(rows) == 0
        else:
            x, y, width, height = box
            assert (x, y) == (columns.min(), rows.min())
            assert (x + width - 1, y + height - 1) == (columns.max(), rows.max())
