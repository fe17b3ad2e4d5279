"""Which sample is what: balanced, mixed, and computed without listing anything."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractalgen import make_recipe
from fractalgen.plan import locate, permute, shard_tasks


@given(st.integers(1, 600), st.integers(0, 2**64 - 1))
def test_permutations_are_permutations(count: int, key: int) -> None:
    assert sorted(permute(index, count, key) for index in range(count)) == list(range(count))


def test_permutations_mix() -> None:
    places = np.array([permute(index, 10_000, 5) for index in range(10_000)])
    assert abs(np.corrcoef(places, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(places[1:], places[:-1])[0, 1]) < 0.05
    assert np.mean(places == np.array([permute(index, 10_000, 6) for index in range(10_000)])) < 0.002


@given(st.integers(1, 30), st.integers(0, 400), st.integers(0, 100))
def test_classes_differ_by_at_most_one_in_every_split(classes: int, more: int, val: int) -> None:
    recipe = make_recipe("single", classes + more, val=val, classes=classes)
    places = [locate(recipe, index) for index in range(recipe.n + val)]
    assert len(set(places)) == len(places)
    assert [place.split for place in places] == ["train"] * recipe.n + ["val"] * val
    for split in ("train", "val"):
        counts = Counter(place.label for place in places if place.split == split)
        per_class = [counts[label] for label in range(classes)]
        assert max(per_class) - min(per_class) <= 1


def test_classes_are_mixed_inside_shards() -> None:
    recipe = make_recipe("single", 10_000, classes=10, shard_size=500)
    for task in shard_tasks(recipe):
        counts = np.bincount([locate(recipe, index).label for index in range(task.first, task.stop)], minlength=10)
        assert counts.min() > 20
        assert counts.max() < 90


def test_shards_cover_all_samples_once() -> None:
    recipe = make_recipe("single", 2501, val=7, classes=10, shard_size=1000)
    tasks = shard_tasks(recipe)
    assert [(task.name, task.first, task.stop) for task in tasks] == [
        ("train-000000.tar", 0, 1000),
        ("train-000001.tar", 1000, 2000),
        ("train-000002.tar", 2000, 2501),
        ("val-000000.tar", 2501, 2508),
    ]


def test_a_million_images_are_planned_at_once() -> None:
    recipe = make_recipe("single", 1_000_000)
    start = time.perf_counter()
    assert len(shard_tasks(recipe)) == 1000
    assert locate(recipe, 999_999).split == "train"
    assert time.perf_counter() - start < 1


def test_indices_outside_are_refused() -> None:
    recipe = make_recipe("single", 20, classes=2)
    for index in (-1, 20):
        with pytest.raises(IndexError):
            locate(recipe, index)
