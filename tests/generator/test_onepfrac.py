"""1p-frac: a fractal and its perturbations, drawn as FractalDB draws, none of them nearly empty."""

import numpy as np
import pytest
import xxhash

from fractalgen import draw_systems, make_recipe, render_sample
from fractalgen.kernels import fractaldb as kernel
from fractalgen.kernels.random import Stream
from fractalgen.kinds.anderson import sample_system
from fractalgen.plan import locate

RECIPE = make_recipe("onepfrac", 40, classes=20)
SYSTEMS = draw_systems(RECIPE)


def test_classes_perturb_one_fractal() -> None:
    """Coefficients differ from those of the sampler of ``single`` by their own factors, probabilities not at all."""
    fractal = sample_system(2, np.random.default_rng([0]), (4.8, 5.2))
    assert 3.4 <= sum(np.linalg.svd(affine)[1] @ (1, 2) for affine in fractal[:, :, :2]) <= 3.6
    area = np.abs(np.linalg.det(fractal[:, :, :2]))
    coefficients = np.concatenate([fractal[:, :, :2].reshape(2, 4), fractal[:, :, 2]], axis=1)
    factors = np.stack([system[:, :6] for system in SYSTEMS]) / coefficients
    assert np.all((factors > 0.9 - 1e-5) & (factors < 1.1 + 1e-5))
    assert 0.03 < factors.std() < 0.08  # that of U(0.9, 1.1) is 0.058, but some are drawn again
    assert len(np.unique(factors.round(9))) == factors.size
    for system in SYSTEMS:
        assert system[:, 6] == pytest.approx(area / area.sum(), abs=1e-5)
        assert np.array_equal(system[:, :6] * 2**24, np.rint(system[:, :6] * 2**24))


def test_images_are_those_of_fractaldb_with_patches() -> None:
    images = {}
    for index in range(40):
        image, label = render_sample(RECIPE, SYSTEMS, index)
        unit = locate(RECIPE, index).unit
        masks = kernel.masks(Stream.of("onepfrac", 0, "train", label, unit.number).key(), 100_000)
        expected = kernel.render(SYSTEMS[label], np.ones(6), 512, 100_000, "patch-gray", masks)
        assert np.array_equal(image, 127 * np.repeat(expected[..., None], 3, axis=2))
        if unit.number == 0:
            assert np.mean(image > 1) > 0.05
        images[label, unit.number] = image
    assert all(np.any(images[label, 0] != images[label, 1]) for label in range(20))  # other masks
    assert all(np.mean(images[label, 0] == images[label, 1]) > 0.5 for label in range(20))  # of the same orbit


def test_pixels_are_pinned() -> None:
    """Changing any system or pixel requires a new recipe version."""
    state = xxhash.xxh3_64()
    for index in (0, 7, 39):
        state.update(render_sample(RECIPE, SYSTEMS, index)[0].tobytes())
    digests = RECIPE.with_systems(SYSTEMS).digest(), state.hexdigest()
    assert digests == ("ff8ba46844cb768c0ef5a15ea4a5c2f7", "b99aa8ff4b6ec8b0")


def test_number_of_classes_changes_no_class() -> None:
    fewer = draw_systems(make_recipe("onepfrac", 3, classes=3))
    assert [system.tobytes() for system in fewer] == [system.tobytes() for system in SYSTEMS[:3]]
