"""Kind ``multi``: objects where the label says, with the published distributions."""

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fractalgen import draw_systems, make_recipe, render_sample
from fractalgen.kernels.random import Stream
from fractalgen.kinds import multi
from fractalgen.kinds.anderson import sample_system
from fractalgen.kinds.kind import Unit
from fractalgen.kinds.multi import MultiParams, render
from fractalshards.errors import FractalError
from fractalshards.sample import MultiLabel


def draw(params: MultiParams, size: int, points: int, number: int) -> tuple[np.ndarray, MultiLabel]:
    """One image, of 24-bit systems as a build has them."""
    rng = np.random.default_rng(0)
    systems = [np.round(sample_system((2, 5), rng) * 2**24) / 2**24 for _ in range(6)]
    ((image, label),) = render(params, size, points, Unit(0, "train", 0, number), systems)
    assert isinstance(image, np.ndarray)
    assert isinstance(label, MultiLabel)
    return image, label


def test_pixels_and_labels_are_pinned() -> None:
    """A change of any pixel or label needs a new recipe version."""
    digests = []
    for number in range(4):
        image, label = draw(MultiParams(), 64, 3000, number)
        digests.append(xxhash.xxh3_64_hexdigest(image.tobytes() + repr(label).encode()))
    assert digests == ["28914583da5e9372", "c26511c3060f3b90", "074ffdc870c97be7", "978c141b5eb6f217"]


@given(st.data())
def test_any_sample_of_any_recipe_renders_and_its_boxes_hold_visible_pixels(data: st.DataObject) -> None:
    recipe = make_recipe(
        "multi",
        data.draw(st.integers(1, 50)),
        val=data.draw(st.integers(0, 5)),
        classes=data.draw(st.integers(1, 60)),
        size=data.draw(st.integers(16, 70)),
        points=data.draw(st.integers(1, 3000)),
        seed=data.draw(st.integers(0, 2**63 - 1)),
        overrides={"background": "false", "blur_probability": "0", "objects": data.draw(st.sampled_from(["1,5", "9"]))},
    )
    systems = draw_systems(recipe)
    index = data.draw(st.integers(0, recipe.n + recipe.val - 1))
    image, label = render_sample(recipe, systems, index)
    assert image.shape == (recipe.size, recipe.size, 3)
    assert image.dtype == np.uint8
    assert isinstance(label, MultiLabel)
    assert label.labels == tuple(sorted({thing.label for thing in label.objects}))
    assert label.labels
    assert max(label.labels) < recipe.classes
    covered = np.zeros(image.shape[:2], bool)
    for x, y, width, height in (thing.bbox for thing in label.objects):
        assert min(x, y) >= 0
        assert max(x + width, y + height) <= recipe.size
        inside = image[y : y + height, x : x + width].any(-1)
        assert all(inside[edge].any() for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]))
        covered[y : y + height, x : x + width] = True
    assert not image[~covered].any()
    again, same_label = render_sample(recipe, systems, index)
    assert np.array_equal(image, again)
    assert label == same_label


def test_what_is_covered_wholly_is_not_in_the_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every object is made a full square, so that the later ones hide what they cover."""
    monkeypatch.setattr(multi, "_draw_object", lambda params, size, *_: np.full((size, size, 3), 9, np.uint8))
    hidden = 0
    for number in range(300):
        params = MultiParams(objects=(4, 4), object_size=(0.3, 0.6), blur_probability=0, background=False)
        image, label = draw(params, 32, 1, number)
        hidden += len(label.objects) < 4
        area = np.zeros((32, 32), bool)
        for x, y, width, height in (thing.bbox for thing in label.objects):
            area[y : y + height, x : x + width] = True
        assert (image.any(-1) <= area).all()
    assert hidden > 10


def test_an_image_without_objects_is_drawn_again_and_not_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def seldom_visible(params: MultiParams, size: int, *_: object) -> np.ndarray:
        tries.append(size)
        return np.full((size, size, 3), int(len(tries) % 7 == 0), np.uint8)

    monkeypatch.setattr(multi, "_draw_object", seldom_visible)
    labels = [draw(MultiParams(objects=(1, 1)), 16, 1, number)[1] for number in range(5)]
    assert len(tries) == 35
    assert all(len(label.objects) == 1 for label in labels)
    monkeypatch.undo()
    with pytest.raises(FractalError, match="no object is visible in any of 100 images") as caught:
        draw(MultiParams(value=(0.0, 0.0)), 16, 10, 0)
    assert "\n" not in str(caught.value)


def test_objects_have_the_published_number_size_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, sides, places, classes = [], [], [], []

    class Recorder(multi.Canvas):
        def paste(self, pixels: np.ndarray, x: int, y: int) -> None:
            sides.append(len(pixels))
            places.append((x + len(pixels) // 2, y + len(pixels) // 2))
            super().paste(pixels, x, y)

    monkeypatch.setattr(multi, "Canvas", Recorder)
    monkeypatch.setattr(multi, "_draw_object", lambda params, size, *_: np.full((size, size, 3), 9, np.uint8))
    for number in range(1500):
        before = len(sides)
        _, label = draw(MultiParams(), 224, 1, number)
        counts.append(len(sides) - before)
        classes += [thing.label for thing in label.objects]
    assert np.abs(np.bincount(counts, minlength=6)[1:] / 1500 - 0.2).max() < 0.04
    assert (min(sides), max(sides)) == (33, 134)  # int(f 224) with f in [0.15, 0.6)
    assert abs(np.mean(sides) - 224 * 0.375) < 2
    centres = np.array(places)
    assert (centres.min(), centres.max()) == (0, 223)
    assert np.abs(centres.mean(0) - 111.5).max() < 4
    assert abs(np.corrcoef(centres.T)[0, 1]) < 0.05
    shares = np.bincount(classes, minlength=6) / len(classes)
    assert np.abs(shares - 1 / 6).max() < 0.03


def test_objects_fill_their_bounding_boxes() -> None:
    """The window is the exact bounding box: the outermost rows and columns are hit, the last but for rounding."""
    rng = np.random.default_rng(0)
    for number in range(20):
        pixels = multi._draw_object(MultiParams(patch=False), 60, 20_000, sample_system((2, 5), rng), Stream.of(number))
        assert all(pixels[edge].any() for edge in (np.s_[:2], np.s_[-2:], np.s_[:, :2], np.s_[:, -2:]))
