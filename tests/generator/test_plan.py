"""Recipes and plans: invalid values are refused, digests cover every field, samples are balanced and shuffled."""

import json
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from building import overrides_of
from fractalgen import draw_systems, make_recipe
from fractalgen.kinds import KINDS
from fractalgen.plan import locate, permute, shard_tasks
from fractalgen.recipe import parse_recipe
from fractalshards.digest import mapping_digest
from fractalshards.errors import FractalError, UsageError


def test_recipe_digest_covers_every_field():
    recipe = make_recipe("single", 100, classes=5, overrides={"maps": "2,3"})
    counts = ("n", "val", "classes", "size", "points", "seed", "shard_size")
    variants = [
        recipe,
        *(replace(recipe, **{name: getattr(recipe, name) + 1}) for name in counts),
        make_recipe("single", 100, classes=5, overrides={"maps": "2,5"}),
        recipe.with_systems(draw_systems(recipe)),
        recipe.with_systems(draw_systems(replace(recipe, seed=1))),
    ]
    assert len({variant.digest() for variant in variants}) == len(variants)
    assert make_recipe("single", np.int64(100), classes=np.uint8(5), overrides={"maps": (2, 3)}) == recipe
    with pytest.raises(UsageError, match="n is"):
        make_recipe("single", 1e3)


@pytest.mark.parametrize("kind", KINDS)
def test_parse_recipe_is_the_inverse_of_to_json(kind):
    recipe = make_recipe(kind, 100, val=10, classes=5, seed=2**60, overrides=overrides_of(kind))
    recipe = recipe.with_systems(draw_systems(recipe))
    assert parse_recipe(json.loads(json.dumps(recipe.to_json())), recipe.digest(), "a test") == recipe


@pytest.mark.parametrize(
    ("changes", "noun"),
    [
        ({"version": 1}, "version 1"),
        ({"kind": "sinlge"}, "'sinlge'"),
        ({"kind": ["single"]}, "kind"),
        ({"params": []}, "params"),
        ({"params": {"blur": 1}}, "'blur'"),
        ({"params": {"maps": {"a": [1]}}}, "maps"),
        ({"params": {}}, "digest"),
        ({"more": 1}, "digest"),
    ],
    ids=str,
)
def test_parse_recipe_refuses_other_json(changes, noun):
    data = make_recipe("single", 100, classes=5).to_json() | changes
    with pytest.raises(FractalError, match=noun) as caught:
        parse_recipe(data, mapping_digest(data), "recipe.json")
    assert not isinstance(caught.value, UsageError)
    assert str(caught.value).startswith("recipe.json")


@given(st.integers(1, 600), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(count, key):
    assert sorted(permute(index, count, key) for index in range(count)) == list(range(count))


@given(st.sampled_from(list(KINDS)), st.integers(1, 30), st.integers(0, 400), st.integers(0, 100), st.integers(0, 86))
def test_locate_balances_classes_and_keeps_units_in_a_shard(kind, classes, more, val, larger):
    per_unit = KINDS[kind].images_per_unit
    n, shard_size, overrides = classes + more, per_unit + larger, overrides_of(kind)
    recipe = make_recipe(kind, n, val=val, classes=classes, shard_size=shard_size, overrides=overrides)
    places = [locate(recipe, index) for index in range(recipe.n + val)]
    assert len({(place.unit, place.part) for place in places}) == len(places)
    assert [place.unit.split for place in places] == ["train"] * recipe.n + ["val"] * val
    for split in ("train", "val"):
        counts = Counter(place.unit.label for place in places if place.unit.split == split)
        per_class = [counts[label] for label in range(classes)]
        assert max(per_class) - min(per_class) <= 1
    parts = Counter(place.unit for place in places)
    assert all(0 <= place.part < place.parts == parts[place.unit] for place in places)
    tasks = shard_tasks(recipe)
    assert [task.first for task in tasks] + [recipe.n + val] == [0] + [task.stop for task in tasks]
    shards = [{places[index].unit for index in range(task.first, task.stop)} for task in tasks]
    assert sum(map(len, shards)) == len(set.union(*shards))
    assert all(0 < task.stop - task.first < shard_size + per_unit for task in tasks)


def test_locate_mixes_classes_and_images_of_units_inside_shards():
    recipe = make_recipe("fractaldb", 4000, classes=10, shard_size=1000)
    for task in shard_tasks(recipe):
        places = [locate(recipe, index) for index in range(task.first, task.stop)]
        assert sum(a.unit == b.unit for a, b in pairwise(places)) < 20
        assert np.bincount([place.part for place in places[:500]], minlength=4).min() > 80
        assert np.bincount([place.unit.label for place in places], minlength=10).min() > 50


def test_locate_needs_few_renders_of_large_images_at_a_time():
    recipe = make_recipe("fractaldb", 4000, classes=10, size=4096)
    seen: Counter[object] = Counter()
    for place in (locate(recipe, index) for index in range(1000)):
        seen[place.unit] += 1
        if seen[place.unit] == place.parts:
            del seen[place.unit]
        assert len(seen) <= 2


def test_locate_is_pinned():
    """Changing the content of an index requires a new recipe version."""
    found = []
    for kind in ("fractaldb", "single", "multi"):
        recipe = make_recipe(kind, 12_345, val=321, classes=67, seed=5)
        places = [locate(recipe, index) for index in range(0, 12_666, 7)]
        before = {"train": 0, "val": places[0].unit.per_class[0]}
        units = ((place.unit, place.part, place.parts) for place in places)
        text = repr([(unit.split, unit.label, unit.number, before[unit.split], *others) for unit, *others in units])
        found.append(xxhash.xxh3_64_hexdigest(text.encode()))
    assert found == ["c2518534f135e573", "82a5e16ca1b839d7", "82a5e16ca1b839d7"]
    for index in (-1, 12_666):
        with pytest.raises(IndexError):
            locate(recipe, index)


@pytest.mark.parametrize("kind", KINDS)
def test_plan_of_a_million_images_is_fast(kind):
    recipe = make_recipe(kind, 1_000_000)
    start = time.process_time()
    assert len(shard_tasks(recipe)) == 1000
    assert locate(recipe, 999_999).unit.split == "train"
    assert time.process_time() - start < 1
