"""All kinds: the same pixels on any CPU; extremes of size and settings; degenerate systems; fresh images."""

import os
import subprocess
import sys
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import building
from fractalgen import draw_systems, make_recipe, render_sample
from fractalgen.categories import shipped_categories
from fractalgen.kernels import fractaldb as kernel
from fractalgen.kernels.random import Stream
from fractalgen.kinds import KINDS, Kind
from fractalgen.kinds.contours import STREAMS
from fractalgen.kinds.kind import show_range
from fractalgen.plan import locate
from fractalgen.render import RenderedSplit
from fractalshards import open_dataset
from fractalshards.errors import FractalError, UsageError
from fractalshards.manifest import load_manifest
from fractalshards.recipe_file import plan_portable
from fractalshards.sample import MultiLabel, classes_of

FEWER_INSTRUCTIONS = {
    "NUMBA_CPU_NAME": "generic",
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",
    "OPENBLAS_CORETYPE": "Prescott",
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA",
}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build all variants with all instructions of this processor."""
    out = tmp_path_factory.mktemp("native")
    building.build_variants(out)
    return out


@pytest.fixture(scope="module")
def with_fewer_instructions(native: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build them again without some instructions, from the same systems, because numpy's matmul may differ by CPU."""
    out, kernels = tmp_path_factory.mktemp("fewer"), tmp_path_factory.mktemp("kernels")
    caches = {"NUMBA_CACHE_DIR": str(kernels), "TMPDIR": str(tmp_path_factory.mktemp("tables"))}
    environment = {**os.environ, **FEWER_INSTRUCTIONS, **caches}
    subprocess.run([sys.executable, building.__file__, out, native], env=environment, check=True)
    assert list(kernels.rglob("*.nbc")), "the kernels were not compiled anew"
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", building.VARIANTS)
def test_build_is_the_same_with_fewer_instructions(name, native, with_fewer_instructions):
    """The files of single and multi are byte-identical, because ISA-L does not make their PNGs."""
    ours, theirs = load_manifest(native / name), load_manifest(with_fewer_instructions / name)
    assert ours.content_digest() == theirs.content_digest()
    if name.startswith(("single", "multi")):
        assert ours.splits == theirs.splits


def test_built_fractaldb_holds_the_pixels_of_its_renderer(tmp_path):
    recipe = building.small_recipe("fractaldb", n=612, classes=6)
    building.build(recipe, tmp_path / "built")
    seen = set()
    for split, count, first in (("train", 612, 0), ("val", 8, 50)):  # training has used two draws of 25 rows
        for key, image, label in map(open_dataset(tmp_path / "built", split).read, range(count)):
            place = locate(recipe, int(key))
            draw, row = divmod(first + place.unit.number, 25)
            masks = kernel.masks(Stream.of("fractaldb", 0, label, row, draw).key(), 20_000)
            category, weights = shipped_categories()[label], kernel.weight_rows()[row]
            indices = kernel.render(category, weights, 96, 20_000, "patch-gray", masks)
            assert np.array_equal(image, kernel.palette("patch-gray")[kernel.flip(indices, place.part)])
            seen.add((label, row, draw, place.part))
    assert len(seen) == 620


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "points"), [(16, 1), (16, 3000), (4096, 1), (4096, 3000)])
def test_extremes_of_size_and_points_render(kind, size, points):
    points = points if KINDS[kind].points else 0
    recipe = make_recipe(kind, 5, classes=5, size=size, points=points, overrides=building.overrides_of(kind))
    systems = draw_systems(recipe)
    image, label = next(one for index in (3, 0, 1, 2) if (one := render_sample(recipe, systems, index))[0].any())
    assert image.shape == (size, size, 3)
    if isinstance(label, MultiLabel):
        assert all(0 <= x < x + w <= size and 0 <= y < y + h <= size for x, y, w, h in (o.bbox for o in label.objects))


def extremes(kind: Kind, field: Field[Any]) -> list[str]:
    """Return the limits of a parameter as ``--set`` takes them; for pairs, also both limits together."""
    low, high = field.metadata["low"], field.metadata["high"]
    if low is None:
        return show_range(kind.params, field).split(", ")
    return [f"{low}", f"{high}", *([f"{low},{high}"] if isinstance(field.default, tuple) else [])]


@given(st.data())
def test_settings_at_their_limits_render_deterministically(data):
    kind = data.draw(st.sampled_from(list(KINDS.values())))
    bound = {"stream", "processes", "instances"} | (
        {"maps", "sigma", "threshold"} if kind.name == "onepfrac" else set()
    )
    free = [field for field in fields(kind.params) if field.name not in bound]  # bound ones limit each other
    chosen = data.draw(st.lists(st.sampled_from(free), unique_by=lambda field: field.name))
    own = {"stream": "own"} if kind.name in STREAMS else {}
    overrides = own | {field.name: data.draw(st.sampled_from(extremes(kind, field))) for field in chosen}
    points = 300 if kind.points else 0
    recipe = make_recipe(kind.name, 6, classes=6, size=24, points=points, overrides=overrides)
    systems, index = draw_systems(recipe), data.draw(st.integers(0, 5))
    try:
        image, label = render_sample(recipe, systems, index)
    except FractalError:
        assert kind.name == "multi"  # objects that are black or too small to be seen
        return
    again, same_label = render_sample(recipe, systems, index)
    assert (image.shape, image.dtype) == ((24, 24, 3), np.uint8)
    assert np.array_equal(image, again)
    assert label == same_label
    assert max(classes_of(label)) < 6


DEGENERATE = {
    "one map": np.array([[[0.5, 0.0, 1.0], [0.0, 0.5, 0.0]]]),
    "all determinants zero": np.array([[[0.5, 0.5, 0.1], [0.5, 0.5, 0.2]], [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]]),
    "no fixed point": np.array([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]], [[0.5, 0.0, 0.0], [0.0, 0.5, 0.0]]]),
    "expanding": np.array([[[9.0, 0.0, 1.0], [0.0, 9.0, 1.0]], [[-9.0, 1.0, 1.0], [0.0, 9.0, 1.0]]]),
    "huge": np.full((3, 2, 3), 1e300),
    "NaN": np.full((2, 2, 3), np.nan),
}
DIVERGING = ("expanding", "huge", "NaN")


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_degenerate_systems_render_or_are_refused(kind, name):
    """A build never draws such systems, but a caller of the API may pass them."""
    overrides = {"background": name in DIVERGING}  # fractals that leave their window show nothing else
    recipe = make_recipe(kind, 4, classes=1, size=48, points=2000, overrides=overrides)
    if kind == "multi" and name in ("huge", "NaN"):
        with pytest.raises(FractalError, match="object"):
            render_sample(recipe, [DEGENERATE[name]], 0)
        return
    image, label = render_sample(recipe, [DEGENERATE[name]], 0)
    assert image.any()
    assert label == 0 or (isinstance(label, MultiLabel) and label.labels == (0,))


TINY = {"val": 5, "classes": 4, "size": 32, "points": 500, "shard_size": 8}


@pytest.mark.parametrize("kind", ["fractaldb", "single", "multi"])
@pytest.mark.parametrize("val", [0, 5])
def test_fresh_images_are_never_drawn_twice(kind, val):
    overrides = {"weight_rows": (0, 2)} if kind == "fractaldb" else {}
    recipe = make_recipe(kind, 19, **{**TINY, "val": val}, overrides=overrides)
    fresh, stored = RenderedSplit(recipe, fresh=True), RenderedSplit(recipe)
    samples = [fresh.read(index) for index in range(19 * 6)]
    images = [sample.image.tobytes() for sample in samples]
    images += [RenderedSplit(recipe, "val").read(index).image.tobytes() for index in range(val)]
    assert images[:19] == [stored.read(index).image.tobytes() for index in range(19)]
    assert len(set(images)) == 19 * 6 + val
    labels = [[sample.label for sample in samples[epoch : epoch + 19]] for epoch in (0, 19)]
    assert labels[0] == labels[1] or kind == "multi"
    for index in (-1, 19):
        with pytest.raises(IndexError):
            stored.read(index)


def test_recipes_that_cannot_be_rendered_are_refused(tmp_path):
    recipe, unfit = make_recipe("single", 8, classes=4, size=32), [np.zeros((3, 7))] * 4
    (tmp_path / "unfit.json").write_bytes(plan_portable(recipe.with_systems(unfit).to_json(), "single", unfit))
    with pytest.raises(FractalError, match=r"unfit\.json"):
        RenderedSplit(tmp_path / "unfit.json")
    with pytest.raises(FractalError, match="'val'"):
        RenderedSplit(recipe, "val")
    with pytest.raises(UsageError, match="'val'"):
        RenderedSplit(make_recipe("single", 8, val=8, classes=4, size=32), "val", fresh=True)
    with pytest.raises(UsageError, match="fractaldb"):
        RenderedSplit(make_recipe("fractaldb", 8, classes=4, size=32, overrides={"draw": "point-gray"}), fresh=True)
