"""Kinds ``single`` and ``multi``: published systems and distributions, pinned pixels, labels of visible objects."""

import json

import numpy as np
import pytest
import xxhash

from fractalgen import draw_systems, make_recipe
from fractalgen.kernels.random import Stream
from fractalgen.kinds import anderson, multi, single
from fractalgen.kinds.anderson import sample_system
from fractalgen.kinds.kind import Unit
from fractalgen.kinds.multi import MultiParams
from fractalgen.kinds.single import SingleParams, jitter
from fractalshards.errors import UsageError
from fractalshards.sample import MultiLabel

SYSTEM = sample_system(3, np.random.default_rng(0))


def draw_single(params: SingleParams, size: int, points: int, unit: Unit, system: np.ndarray = SYSTEM) -> np.ndarray:
    ((image, label),) = single.render(params, size, points, unit, [system] * (unit.label + 1))
    assert label == unit.label
    return image


def draw_multi(params: MultiParams, size: int, points: int, number: int) -> tuple[np.ndarray, MultiLabel]:
    """Render one image of each of six systems, rounded to 24 bits as in a build."""
    rng = np.random.default_rng(0)
    systems = [np.round(sample_system((2, 5), rng) * 2**24) / 2**24 for _ in range(6)]
    ((image, label),) = multi.render(params, size, points, Unit(0, "train", 0, number), systems)
    return image, label


def is_uniform(values: np.ndarray, low: float, high: float) -> bool:
    """Return whether values look uniform in [low, high), by their ends, mean and spread."""
    width = high - low
    reached = low <= values.min() < low + 0.02 * width and high - 0.02 * width < values.max() <= high
    centred = abs(values.mean() - (low + high) / 2) < 0.03 * width
    return bool(reached and centred and abs(values.std() / width - 12**-0.5) < 0.02)


def test_single_pixels_are_pinned():
    """Changing any pixel requires a new recipe version. The system is fixed, because numpy draws it."""
    system = np.round(SYSTEM * 2**24) / 2**24
    images = [draw_single(SingleParams(), 64, 5000, Unit(0, "train", 1, number), system) for number in range(3)]
    plain = SingleParams(background=False, color=False)
    images.append(draw_single(plain, 50, 777, Unit(0, "val", 2, 0), system))
    digests = [xxhash.xxh3_64_hexdigest(image.tobytes()) for image in images]
    assert digests == ["107cb22a658315a4", "88dbb57e478998ac", "e7ae8566df6723b5", "4c262fdbcfbf10a0"]


def test_multi_pixels_and_labels_are_pinned():
    digests = []
    for number in range(4):
        image, label = draw_multi(MultiParams(), 64, 3000, number)
        digests.append(xxhash.xxh3_64_hexdigest(image.tobytes() + repr(label).encode()))
    assert digests == ["28914583da5e9372", "c26511c3060f3b90", "074ffdc870c97be7", "978c141b5eb6f217"]


def test_sample_system_equals_the_published_sampler(reference):
    cases = json.loads((reference / "published_single" / "systems.json").read_text())
    assert cases
    for case in cases:
        n = case["n"] if isinstance(case["n"], int) else tuple(case["n"])
        system = sample_system(n, np.random.default_rng(case["seed"]))
        np.testing.assert_allclose(system, case["system"], rtol=0, atol=4e-16)
    for n in (1, (1, 2)):
        with pytest.raises(UsageError, match="maps"):
            sample_system(n, np.random.default_rng(0))


@pytest.mark.parametrize(("kind", "maps"), [("single", {2, 3, 4}), ("onepfrac", {2})])
def test_systems_do_not_depend_on_the_number_of_classes(kind, maps):
    few, many = (draw_systems(make_recipe(kind, 50, classes=classes, seed=3)) for classes in (5, 50))
    assert all(np.array_equal(a, b) for a, b in zip(few, many, strict=False))
    coefficients = [system[:, :6] * 2**24 for system in many]  # without the probabilities of ``onepfrac``
    assert all(np.array_equal(values, np.round(values)) for values in coefficients)
    assert {len(system) for system in many} == maps


def test_jitter_scales_one_map_within_singular_value_1():
    system = SYSTEM.copy()
    system[1, :, :2] *= 0.999 / np.linalg.svd(system[1, :, :2], compute_uv=False).max()
    rng = Stream.of("jitter")
    factors = []
    for _ in range(300):
        jittered = jitter(system, (0.8, 1.1), rng)
        assert np.linalg.svd(jittered[:, :, :2], compute_uv=False).max() <= 1 + 1e-12
        ratio = (jittered / system).reshape(3, 6)
        assert np.allclose(ratio, ratio[:, :1])
        assert np.sum(ratio[:, 0] != 1) <= 1
        factors.append((int(np.argmax(ratio[:, 0] != 1)), ratio[ratio[:, 0] != 1, 0]))
    assert all(0.8 <= factor <= 1.1 for _, values in factors for factor in values)
    assert max(values[0] for k, values in factors if k == 0 and len(values)) > 1.05
    rigid = np.eye(2, 3)[None]
    assert np.array_equal(jitter(rigid, (1.01, 1.1), Stream.of("never")), rigid)  # after four tries


def test_single_windows_patches_and_colors_have_the_published_distributions():
    rng, params = Stream.of("windows"), SingleParams()
    windows = np.array([single._draw_window((10.0, -4.0, 14.0, 4.0), params, rng) for _ in range(4000)])
    for low, high, extent, middle in ((windows[:, 0], windows[:, 2], 4, 12), (windows[:, 1], windows[:, 3], 8, 0)):
        assert is_uniform(((low + high) / 2 - middle) / extent, -0.2, 0.2)
        assert is_uniform((high - low) / extent, 0.5, 2.0)
    assert abs(np.corrcoef(windows[:, 2] - windows[:, 0], windows[:, 3] - windows[:, 1])[0, 1]) < 0.05
    masks = [sum(1 << (3 * i + j) for i, j in anderson.draw_patch(params, rng).tolist()) for _ in range(51_100)]
    counts = np.bincount(masks, minlength=512)
    assert counts[0] == 0
    assert 380 < ((counts[1:] - 100) ** 2 / 100).sum() < 640  # chi-square with 510 degrees of freedom
    drawn = [anderson.draw_fractal_colors(params, rng) for _ in range(4000)]
    assert is_uniform(np.array([colors.hue_shift for colors in drawn]), 0, 255)
    assert is_uniform(np.array([colors.saturation + 0.5 for colors in drawn]), 0.3 * 255, 255)
    assert is_uniform(np.array([colors.value + 0.5 for colors in drawn]), 0.5 * 255, 255)
