"""Kind ``fractaldb``: the published composition of categories, weight rows, patch draws and flips."""

from collections import Counter

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fractalgen import draw_systems, make_recipe, render_sample
from fractalgen.categories import shipped_categories
from fractalgen.kernels import fractaldb as kataoka
from fractalgen.kernels.random import Stream
from fractalgen.kinds import fractaldb
from fractalgen.kinds.fractaldb import FractaldbParams
from fractalgen.kinds.kind import Unit
from fractalgen.plan import locate
from fractalshards.errors import UsageError
from fractalshards.png import Indexed


def draw(params: FractaldbParams, unit: Unit, size: int = 64, points: int = 5000) -> list[Indexed]:
    """The four images of a unit."""
    rendered = fractaldb.render(params, size, points, unit, shipped_categories())
    assert [label for _, label in rendered] == [unit.label] * 4
    images = [image for image, _ in rendered]
    assert all(isinstance(image, Indexed) for image in images)
    return images


def test_pixels_are_pinned() -> None:
    """A change of any pixel needs a new recipe version."""
    digests = []
    for number, name in enumerate(kataoka.DRAWS):
        images = draw(FractaldbParams(draw=name), Unit(7, "train", 3, number))
        digests.append(xxhash.xxh3_64_hexdigest(b"".join(image.rgb().tobytes() for image in images)))
    assert digests == ["ee8b28242a501bd2", "fa3cc686905f2f66", "d48008034278d3f1", "adef9d36794a95ff"]


@given(st.data())
def test_any_sample_of_any_recipe_renders_and_is_deterministic(data: st.DataObject) -> None:
    classes = data.draw(st.integers(1, 6))
    recipe = make_recipe(
        "fractaldb",
        data.draw(st.integers(classes, 60 * classes)),
        val=data.draw(st.integers(0, 5)),
        classes=classes,
        size=data.draw(st.integers(16, 70)),
        points=data.draw(st.integers(1, 3000)),
        seed=data.draw(st.integers(0, 2**63 - 1)),
        overrides={"draw": data.draw(st.sampled_from(kataoka.DRAWS)), "weight_step": data.draw(st.sampled_from("01"))},
    )
    systems = draw_systems(recipe)
    index = data.draw(st.integers(0, recipe.n + recipe.val - 1))
    image, label = render_sample(recipe, systems, index)
    assert image.shape == (recipe.size, recipe.size, 3)
    assert image.dtype == np.uint8
    assert label == locate(recipe, index).unit.label
    assert np.array_equal(image, render_sample(recipe, systems, index)[0])


def test_a_million_are_the_published_composition() -> None:
    """Every class has 25 weight rows, 10 draws and 4 flips of each: checked on all images of some classes."""
    recipe = make_recipe("fractaldb", 100_000, classes=100)
    assert make_recipe("fractaldb", 1_000_000).classes == 1000
    taken = Counter(
        (place.unit.label, place.unit.number, place.part) for place in (locate(recipe, i) for i in range(100_000))
    )
    assert taken == Counter((label, number, part) for label in range(100) for number in range(250) for part in range(4))


@pytest.mark.parametrize("name", kataoka.DRAWS)
def test_images_are_those_of_the_renderer(name: kataoka.Draw) -> None:
    """Number 60 is weight row 10 of the third draw; flips are those of the published code."""
    images = draw(FractaldbParams(draw=name, weight_rows=(0, 24)), Unit(5, "train", 2, 60 if "patch" in name else 10))
    masks = kataoka.masks(Stream.of("fractaldb", 5, 2, 10, 2).key(), 5000) if "patch" in name else None
    expected = kataoka.render(shipped_categories()[2], kataoka.weight_rows()[10], 64, 5000, name, masks)
    for flip, image in enumerate(images):
        views = (expected, expected[::-1], expected[:, ::-1], expected[::-1, ::-1])
        assert np.array_equal(image.indices, views[flip])
        assert np.array_equal(image.palette, kataoka.palette(name))


def test_patches_are_drawn_anew_for_every_class_weight_row_draw_and_seed() -> None:
    params = FractaldbParams(weight_step=0.0)  # all weight rows render alike but for their patches
    units = [Unit(0, "train", 0, number) for number in range(50)] + [Unit(1, "train", 0, 0)]
    assert len({draw(params, unit)[0].indices.tobytes() for unit in units}) == len(units)


@pytest.mark.parametrize(("name", "n"), [("patch-gray", 240), ("patch-gray", 1000), ("point-gray", 240)])
def test_evaluation_shares_no_render_with_training(name: str, n: int) -> None:
    recipe = make_recipe("fractaldb", n, val=40, classes=10, size=32, points=500, overrides={"draw": name})
    systems = draw_systems(recipe)
    images = [(label, image.tobytes()) for image, label in (render_sample(recipe, systems, i) for i in range(n + 40))]
    assert not set(images[:n]) & set(images[n:])


def test_evaluation_takes_new_draws_of_the_first_weight_rows_and_points_the_rows_that_are_left() -> None:
    recipe = make_recipe("fractaldb", 240, val=40, classes=10, size=32, points=500)
    unit = next(locate(recipe, index).unit for index in range(240, 280) if locate(recipe, index).unit.label == 4)
    assert (unit.split, unit.number, unit.before) == ("val", 0, 6)
    masks = kataoka.masks(Stream.of("fractaldb", 0, 4, 0, 1).key(), 500)
    weights = kataoka.weight_rows()
    expected = kataoka.render(shipped_categories()[4], weights[0], 32, 500, "patch-gray", masks)
    assert np.array_equal(draw(FractaldbParams(), unit, 32, 500)[0].indices, expected)
    points = draw(FractaldbParams(draw="point-gray"), unit, 32, 500)[0]
    assert np.array_equal(points.indices, kataoka.render(shipped_categories()[4], weights[6], 32, 500, "point-gray"))


def test_point_kinds_have_a_hundred_images_per_class_and_refuse_more() -> None:
    points = {"draw": "point-color"}
    assert make_recipe("fractaldb", 1000, classes=10, overrides=points).n == 1000
    assert make_recipe("fractaldb", 960, val=40, classes=10, overrides=points).val == 40
    for n, val in ((1001, 0), (1000, 1), (950, 60)):
        with pytest.raises(UsageError, match="kind fractaldb with these parameters has 100") as caught:
            make_recipe("fractaldb", n, val=val, classes=10, overrides=points)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="has 12"):
        make_recipe("fractaldb", 130, classes=10, overrides={**points, "weight_rows": "2,4"})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"draw": "patch"}, "draw=patch: expected point-gray or patch-gray"),
        ({"weight_rows": "0,25"}, "weight_rows is 0,25"),
        ({"weight_rows": "5,4"}, "weight_rows is 5,4"),
        ({"weight_step": "-1"}, "weight_step is -1"),
    ],
    ids=str,
)
def test_nonsense_is_refused(overrides: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_recipe("fractaldb", 1000, overrides=overrides)


def test_more_classes_than_come_along_say_where_to_get_them() -> None:
    with pytest.raises(UsageError, match="fractalgen search --classes 1001"):
        draw_systems(make_recipe("fractaldb", 2000, classes=1001))
