"""Samples rendered on demand are those of the shards; fresh ones are never drawn twice."""

from pathlib import Path

import numpy as np
import pytest

from building import run
from fractalgen import draw_systems, make_recipe
from fractalgen.render import RenderedSplit, open_recipe
from fractalshards.errors import FractalError, UsageError
from fractalshards.manifest import load_manifest
from fractalshards.reader import decode_sample, index_split, iterate_shard
from fractalshards.sample import classes_of

TINY = {"val": 5, "classes": 4, "size": 32, "points": 500, "shard_size": 8}


@pytest.mark.parametrize("kind", ["fractaldb", "single", "multi"])
def test_rendered_samples_are_those_of_the_shards(kind: str, tmp_path: Path, threads: None) -> None:
    options = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", value)]
    file = tmp_path / "recipe.json"
    text = run("recipe", "--kind", kind, "--n", 19, *options)
    assert text.exit_code == 0, text.output
    assert run("recipe", "--kind", kind, "--n", 19, *options, "--out", file).exit_code == 0
    assert file.read_bytes() == text.stdout_bytes
    result = run("build", "--recipe", file, "--out", tmp_path / "built")
    assert result.exit_code == 0, result.output
    assert "compare" in result.stderr
    manifest = load_manifest(tmp_path / "built")
    for split in ("train", "val"):
        shards = index_split(manifest, split)
        rendered = open_recipe(file, split)
        assert rendered.lengths == tuple(len(shard.offsets) - 1 for shard in shards)
        samples = [sample for shard in shards for sample in iterate_shard(shard)]
        for index, sample in enumerate(samples):
            key, image, label = rendered.read(index)
            stored, stored_label = decode_sample(sample, 4)
            assert (key, label) == (sample.key, stored_label if kind != "multi" else classes_of(stored_label))
            assert np.array_equal(image, stored)
        with pytest.raises(IndexError):
            rendered.read(len(samples))
        with pytest.raises(IndexError):
            rendered.read(-1)
    assert rendered.digest == manifest.recipe_digest


@pytest.mark.parametrize("kind", ["fractaldb", "single", "multi"])
@pytest.mark.parametrize("val", [0, 5])
def test_fresh_images_are_never_drawn_twice(kind: str, val: int) -> None:
    recipe = make_recipe(
        kind, 19, **{**TINY, "val": val}, overrides={"weight_rows": (0, 2)} if kind == "fractaldb" else {}
    )
    fresh, stored = open_recipe(recipe, fresh=True), open_recipe(recipe)
    held_out = open_recipe(recipe, "val") if val else None
    epochs = 6
    images = [fresh.read(index)[1].tobytes() for index in range(19 * epochs)]
    images += [held_out.read(index)[1].tobytes() for index in range(val)] if held_out else []
    assert images[:19] == [stored.read(index)[1].tobytes() for index in range(19)]
    assert len(set(images)) == 19 * epochs + val
    assert [fresh.read(19 + index)[2] for index in range(19)] == [
        stored.read(index)[2] for index in range(19)
    ] or kind == "multi"


def test_recipes_that_cannot_be_rendered_are_refused(tmp_path: Path) -> None:
    recipe = make_recipe("single", 8, classes=4, size=32)
    with pytest.raises(FractalError, match="'val'"):
        open_recipe(recipe, "val")
    with pytest.raises(UsageError, match="'val'"):
        open_recipe(make_recipe("single", 8, val=8, classes=4, size=32), "val", fresh=True)
    with pytest.raises(UsageError, match="fractaldb"):
        open_recipe(make_recipe("fractaldb", 8, classes=4, size=32, overrides={"draw": "point-gray"}), fresh=True)
    others = draw_systems(make_recipe("single", 8, classes=4, size=32, seed=1))
    with pytest.raises(FractalError, match="systems"):
        RenderedSplit(recipe.with_systems(draw_systems(recipe)), others, "train")
    with pytest.raises(FractalError, match="systems"):
        RenderedSplit(recipe.with_systems(others[:3]), others[:3], "train")
