"""Kind ``single``: the same sample always and everywhere, with the published distributions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from fractalgen import draw_systems, make_recipe, render_sample
from fractalgen.kernels.random import Stream
from fractalgen.kernels.raster import Orientation
from fractalgen.kinds import anderson, single
from fractalgen.kinds.anderson import rasterize, sample_system
from fractalgen.kinds.kind import Unit
from fractalgen.kinds.single import SingleParams, jitter, render
from hsv import hsv_to_rgb

Identity = tuple[int, str, int, int]  # seed, split, label, number


def draw(params: SingleParams, size: int, points: int, identity: Identity, system: np.ndarray) -> np.ndarray:
    """One image of a class."""
    unit = Unit(*identity)
    ((image, label),) = render(params, size, points, unit, [system] * (unit.label + 1))
    assert label == unit.label
    return image


def test_pixels_are_pinned() -> None:
    """A change of any pixel needs a new recipe version; the systems are pinned beside it, for numpy draws them."""
    rng = np.random.default_rng(0)
    system = np.round(sample_system(3, rng) * 2**24) / 2**24
    images = [draw(SingleParams(), 64, 5000, (0, "train", 1, replica), system) for replica in range(3)]
    images.append(draw(SingleParams(background=False, color=False), 50, 777, (0, "val", 2, 0), system))
    digests = [xxhash.xxh3_64_hexdigest(image.tobytes()) for image in images]
    assert digests == ["107cb22a658315a4", "88dbb57e478998ac", "e7ae8566df6723b5", "4c262fdbcfbf10a0"]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_sample_of_any_recipe_renders_and_is_deterministic(data: st.DataObject) -> None:
    classes = data.draw(st.integers(1, 6))
    recipe = make_recipe(
        "single",
        data.draw(st.integers(classes, 50)),
        val=data.draw(st.integers(0, 5)),
        classes=classes,
        size=data.draw(st.integers(16, 70)),
        points=data.draw(st.integers(1, 3000)),
        seed=data.draw(st.integers(0, 2**63 - 1)),
        overrides={"blur_probability": data.draw(st.sampled_from(["0", "0.5", "1"]))},
    )
    systems = draw_systems(recipe)
    index = data.draw(st.integers(0, recipe.n + recipe.val - 1))
    image, label = render_sample(recipe, systems, index)
    assert image.shape == (recipe.size, recipe.size, 3)
    assert image.dtype == np.uint8
    assert 0 <= label < classes
    again, same_label = render_sample(recipe, systems, index)
    assert np.array_equal(image, again)
    assert label == same_label


def test_samples_differ_between_replicas_seeds_and_splits() -> None:
    system = sample_system(3, np.random.default_rng(0))
    identities = [(0, "train", 1, 0), (0, "train", 1, 1), (0, "val", 1, 0), (1, "train", 1, 0), (0, "train", 2, 0)]
    images = {draw(SingleParams(), 32, 2000, identity, system).tobytes() for identity in identities}
    assert len(images) == len(identities)


def test_a_class_looks_the_same_in_a_larger_dataset() -> None:
    small, large = (make_recipe("single", n, classes=4, size=32, points=500) for n in (40, 80))
    systems = draw_systems(small)
    images = {render_sample(small, systems, index)[0].tobytes() for index in range(40)}
    assert images < {render_sample(large, systems, index)[0].tobytes() for index in range(80)}


def test_systems_do_not_depend_on_the_number_of_classes_and_are_exact_in_24_bits() -> None:
    few, many = (draw_systems(make_recipe("single", 50, classes=classes, seed=3)) for classes in (5, 50))
    assert all(np.array_equal(a, b) for a, b in zip(few, many, strict=False))
    assert all(np.array_equal(system * 2**24, np.round(system * 2**24)) for system in many)
    assert {len(system) for system in many} == {2, 3, 4}


def test_jitter_scales_one_map_and_never_beyond_singular_value_1() -> None:
    system = sample_system(3, np.random.default_rng(0))
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


def test_jitter_gives_up_after_four_tries() -> None:
    system = np.zeros((1, 2, 3))
    system[0, :, :2] = np.eye(2)
    assert np.array_equal(jitter(system, (1.01, 1.1), Stream.of("never")), system)


@pytest.mark.parametrize(("name", "value"), [("background", "false"), ("color", "false")])
def test_without_background_or_colour(name: str, value: str) -> None:
    recipe = make_recipe("single", 10, classes=2, size=48, overrides={name: value, "blur_probability": "0"})
    image, _ = render_sample(recipe, draw_systems(recipe), 0)
    if name == "background":
        assert (image == 0).all(-1).mean() > 0.05
    else:
        assert (image == 127).all(-1).mean() > 0.01


def test_every_image_shows_its_fractal() -> None:
    recipe = make_recipe("single", 200, classes=50, size=64, points=20_000, overrides={"background": "false"})
    systems = draw_systems(recipe)
    shares = [render_sample(recipe, systems, index)[0].any(-1).mean() for index in range(200)]
    assert min(shares) > 0
    assert 0.1 < np.mean(shares) < 0.6


def uniform(values: np.ndarray, low: float, high: float) -> bool:
    """Whether values look uniform in [low, high): ends reached, mean and spread right."""
    width = high - low
    reached = low <= values.min() < low + 0.02 * width and high - 0.02 * width < values.max() <= high
    centred = abs(values.mean() - (low + high) / 2) < 0.03 * width
    return bool(reached and centred and abs(values.std() / width - 12**-0.5) < 0.02)


def test_windows_have_the_published_distribution_on_each_axis() -> None:
    rng = Stream.of("windows")
    windows = np.array([single._draw_window((10.0, -4.0, 14.0, 4.0), SingleParams(), rng) for _ in range(4000)])
    for low, high, extent, middle in ((windows[:, 0], windows[:, 2], 4, 12), (windows[:, 1], windows[:, 3], 8, 0)):
        assert uniform(((low + high) / 2 - middle) / extent, -0.2, 0.2)
        assert uniform((high - low) / extent, 0.5, 2.0)
    assert abs(np.corrcoef(windows[:, 2] - windows[:, 0], windows[:, 3] - windows[:, 1])[0, 1]) < 0.05


def test_patches_are_all_but_the_empty_one_equally_often() -> None:
    rng = Stream.of("patches")
    masks = [sum(1 << (3 * i + j) for i, j in anderson.draw_patch(SingleParams(), rng).tolist()) for _ in range(51_100)]
    counts = np.bincount(masks, minlength=512)
    assert counts[0] == 0
    assert 380 < ((counts[1:] - 100) ** 2 / 100).sum() < 640  # chi-square with 510 degrees of freedom


def test_colours_have_the_published_ranges() -> None:
    rng = Stream.of("colours")
    drawn = [anderson.draw_fractal_colors(SingleParams(), rng) for _ in range(4000)]
    assert uniform(np.array([colors.hue_shift for colors in drawn]), 0, 255)
    assert uniform(np.array([colors.saturation + 0.5 for colors in drawn]), 0.3 * 255, 255)
    assert uniform(np.array([colors.value + 0.5 for colors in drawn]), 0.5 * 255, 255)


def test_the_rasteriser_that_is_checked_is_the_one_that_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an image is painted from is what ``rasterize`` gives for its points, window and patch."""
    seen = {}

    def recording(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            seen[name] = args, function(*args)
            return seen[name][1]

        return call

    for name in ("splat", "paint"):
        monkeypatch.setattr(single, name, recording(name, getattr(single, name)))
    params = SingleParams(flips=False, blur_probability=0, background=False)
    for number in range(8):
        image = draw(params, 64, 5000, (0, "train", 0, number), sample_system((2, 5), np.random.default_rng(number)))
        (xs, ys, size, window, patch, _), counts = seen["splat"]
        assert np.shares_memory(seen["paint"][0][0], counts)
        graded = rasterize(np.stack([xs, ys], 1), size, window, patch)
        assert np.array_equal(graded, counts / max(counts.max(), 1))
        colors = seen["paint"][0][1]
        hue = (np.float32(graded) * np.float32(255) + np.float32(colors.hue_shift)).astype(int) & 255
        hit = rasterize(np.stack([xs, ys], 1), size, window, patch, graded=False).astype(bool)
        hsv = (
            np.stack([hue, np.full_like(hue, colors.saturation), np.full_like(hue, colors.value)], -1) * hit[..., None]
        )
        rounded = hsv_to_rgb(hsv.astype(np.uint8)).astype(int) - image
        assert np.isin(rounded, (0, 1)).all(-1).mean() > 0.999


def test_half_of_the_images_are_transposed_mirrored_and_blurred(monkeypatch: pytest.MonkeyPatch) -> None:
    system = sample_system(3, np.random.default_rng(0))
    orientations, sigmas = [], []
    monkeypatch.setattr(anderson, "Orientation", lambda *flips: orientations.append(flips) or Orientation(*flips))
    monkeypatch.setattr(anderson, "gaussian_blur", lambda image, sigma: sigmas.append(sigma) or image)
    for replica in range(2000):
        draw(SingleParams(), 16, 16, (0, "train", 0, replica), system)
    flips = np.array(orientations)
    assert np.abs(flips.mean(0) - 0.5).max() < 0.04
    assert np.abs(np.corrcoef(flips.T) - np.eye(3)).max() < 0.08
    assert abs(len(sigmas) / 2000 - 0.5) < 0.04
    assert uniform(np.array(sigmas), 0.5, 1.0)
