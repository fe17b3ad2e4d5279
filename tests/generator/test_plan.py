"""Which sample is what: balanced, mixed, and computed without listing anything."""

import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import xxhash
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


@given(
    st.sampled_from(["fractaldb", "single", "multi"]),
    st.integers(1, 30),
    st.integers(0, 400),
    st.integers(0, 100),
    st.integers(4, 90),
)
def test_classes_differ_by_at_most_one_and_units_lie_in_one_shard(
    kind: str, classes: int, more: int, val: int, shard_size: int
) -> None:
    recipe = make_recipe(kind, classes + more, val=val, classes=classes, shard_size=shard_size)
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
    assert all(0 < task.stop - task.first < shard_size + 4 for task in tasks)


@given(st.integers(1, 9), st.integers(0, 300))
def test_a_class_takes_flips_first_then_weight_rows_then_draws(classes: int, more: int) -> None:
    recipe = make_recipe("fractaldb", classes + more, classes=classes)
    taken: dict[int, set[int]] = {label: set() for label in range(classes)}
    for index in range(recipe.n):
        place = locate(recipe, index)
        taken[place.unit.label].add(4 * place.unit.number + place.part)
    assert all(numbers == set(range(len(numbers))) for numbers in taken.values())


def test_the_images_of_a_unit_are_shuffled_with_others_of_their_shard() -> None:
    recipe = make_recipe("fractaldb", 4000, classes=10, shard_size=1000)
    for task in shard_tasks(recipe):
        places = [locate(recipe, index) for index in range(task.first, task.stop)]
        assert sum(a.unit == b.unit for a, b in pairwise(places)) < 20
        parts = np.bincount([place.part for place in places[:500]], minlength=4)
        assert parts.min() > 80


def test_a_worker_holds_few_renders_at_a_time_of_large_images() -> None:
    recipe = make_recipe("fractaldb", 4000, classes=10, size=4096)
    held: set[object] = set()
    most = 0
    seen: Counter[object] = Counter()
    for index in range(1000):
        place = locate(recipe, index)
        seen[place.unit] += 1
        held.add(place.unit)
        most = max(most, len(held))
        if seen[place.unit] == place.parts:
            held.discard(place.unit)
    assert most <= 2


def test_the_order_is_pinned() -> None:
    """A change of what an index stands for needs a new recipe version."""
    found = []
    for kind in ("fractaldb", "single", "multi"):
        recipe = make_recipe(kind, 12_345, val=321, classes=67, seed=5)
        places = [locate(recipe, index) for index in range(0, 12_666, 7)]
        text = repr([(x.unit.split, x.unit.label, x.unit.number, x.unit.before, x.part, x.parts) for x in places])
        found.append(xxhash.xxh3_64_hexdigest(text.encode()))
    assert found == ["c2518534f135e573", "82a5e16ca1b839d7", "82a5e16ca1b839d7"]


def test_classes_are_mixed_inside_shards() -> None:
    recipe = make_recipe("single", 10_000, classes=10, shard_size=500)
    for task in shard_tasks(recipe):
        counts = np.bincount([locate(recipe, index).unit.label for index in range(task.first, task.stop)], minlength=10)
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


def test_shards_of_units_hold_as_many_more_as_end_a_unit() -> None:
    recipe = make_recipe("fractaldb", 250, classes=10, shard_size=102)
    assert [(task.first, task.stop) for task in shard_tasks(recipe)] == [(0, 104), (104, 204), (204, 250)]


@pytest.mark.parametrize("kind", ["fractaldb", "single", "multi"])
def test_a_million_images_are_planned_at_once(kind: str) -> None:
    recipe = make_recipe(kind, 1_000_000)
    start = time.perf_counter()
    assert len(shard_tasks(recipe)) == 1000
    assert locate(recipe, 999_999).unit.split == "train"
    assert time.perf_counter() - start < 1


def test_indices_outside_are_refused() -> None:
    recipe = make_recipe("single", 20, classes=2)
    for index in (-1, 20):
        with pytest.raises(IndexError):
            locate(recipe, index)
