"""Systems and rasteriser against the output of the published code."""

import json
from pathlib import Path

import numpy as np
import pytest

from fractalgen.kinds.anderson import rasterize, sample_system
from fractalshards.errors import UsageError


@pytest.fixture(scope="module")
def renders(reference: Path) -> dict[str, np.ndarray]:
    with np.load(reference / "published_single" / "render.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_systems_equal_the_published_sampler(reference: Path) -> None:
    cases = json.loads((reference / "published_single" / "systems.json").read_text())
    assert cases
    for case in cases:
        n = case["n"] if isinstance(case["n"], int) else tuple(case["n"])
        system = sample_system(n, np.random.default_rng(case["seed"]))
        np.testing.assert_allclose(system, case["system"], rtol=0, atol=4e-16)


def test_sampled_systems_are_contractive_and_hit_the_sigma_factor() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        system = sample_system((2, 9), rng)
        values = np.linalg.svd(system[:, :, :2], compute_uv=False)
        assert values.max() <= 1 + 1e-12
        assert (5 + len(system)) / 2 - 1e-9 <= (values @ [1, 2]).sum() <= (6 + len(system)) / 2 + 1e-9
        assert np.abs(system[:, :, 2]).max() <= 1


def test_rasterizer_equals_the_published_one(renders: dict[str, np.ndarray]) -> None:
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
            np.testing.assert_allclose(
                rasterize(points, 64, **options),
                renders[f"{case}_{image}"],
                rtol=0,
                atol=1e-12,
                err_msg=f"{case} {image}",
            )


def test_points_just_outside_reach_in_with_their_patch() -> None:
    points = np.array([[-1.5, 3.0], [3.0, 8.4], [-2.5, 3.0], [np.nan, 1.0], [np.inf, 1.0], [3.0, 1e30]])
    corner_cells = np.array([[2, 1], [1, 0]])
    counts = rasterize(points, 8, window=[0, 0, 7, 7], patch=corner_cells, graded=False)
    assert np.argwhere(counts).tolist() == [[0, 3], [3, 7]]


def test_one_map_is_refused_and_numpy_integers_are_numbers() -> None:
    for n in (1, 0, (1, 2)):
        with pytest.raises(UsageError, match="at least 2"):
            sample_system(n, np.random.default_rng(0))
    assert sample_system(np.int64(3), np.random.default_rng(0)).shape == (3, 2, 3)


def test_points_of_any_number_type_and_an_empty_patch() -> None:
    points = [[0, 0], [1, 2], [3, 4]]
    assert np.argwhere(rasterize(points, 16)).tolist() == [[0, 0], [5, 7], [15, 15]]
    for patch in ([], np.zeros((0, 2))):
        assert not rasterize(points, 16, patch=patch).any()
        assert not rasterize(points, 16, patch=patch, graded=False).any()


@pytest.mark.parametrize(
    ("points", "size", "patch"),
    [
        (np.zeros((0, 2)), 16, None),
        (np.zeros((3, 3)), 16, None),
        (np.zeros(4), 16, None),
        (np.zeros((3, 2)), 0, None),
        (np.zeros((3, 2)), 16, [[3, 3]]),
        (np.zeros((3, 2)), 16, [[-900, 1]]),
    ],
    ids=str,
)
def test_what_cannot_be_rasterised_is_refused(points: np.ndarray, size: int, patch: object) -> None:
    with pytest.raises(UsageError, match="expected"):
        rasterize(points, size, patch=patch)


def test_degenerate_points_give_one_pixel() -> None:
    image = rasterize(np.full((10, 2), 0.25), 16)
    assert np.argwhere(image).tolist() == [[0, 0]]
    assert image[0, 0] == 1
