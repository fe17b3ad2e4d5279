"""FractalDB's search: the published categories, whatever the number of workers, and an end when it is asked for."""

import json
from pathlib import Path

import numpy as np
import pytest

from fractalgen.categories import search_categories, shipped_categories
from fractalshards.errors import UsageError


def test_a_search_finds_the_published_categories() -> None:
    """The third lies beyond the first batch of candidates."""
    calls: list[int] = []
    found = search_categories(3, workers=2, advance=calls.append)
    assert [one.candidate for one in found] == [24, 29, 68]
    assert all(np.array_equal(one.category, shipped_categories()[index]) for index, one in enumerate(found))
    assert calls == [2, 1]


def test_fill_rates_are_the_published_ones(reference: Path) -> None:
    published = json.loads((reference / "fractaldb_search.json").read_text())[:30]
    for one, theirs in zip(search_categories(30, workers=2), published, strict=True):
        assert one.candidate == theirs["candidate"]
        assert one.fill_rate == theirs["fill_rate"]


def test_other_searches_find_the_same_with_any_number_of_workers() -> None:
    alone, together = (search_categories(12, seed=7, fill_rate=0.1, workers=workers) for workers in (1, 3))
    assert [(one.candidate, one.fill_rate) for one in alone] == [(one.candidate, one.fill_rate) for one in together]
    assert all(np.array_equal(a.category, b.category) for a, b in zip(alone, together, strict=True))
    assert all(one.fill_rate >= 0.1 for one in alone)
    assert not any(np.array_equal(alone[0].category, category) for category in shipped_categories())


def test_a_search_without_end_shows_progress_and_can_be_stopped() -> None:
    seen = []

    def advance(count: int) -> None:
        seen.append(count)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_categories(1, fill_rate=0.38, advance=advance)
    assert seen == [0] * 5


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"classes": 0}, "classes is 0"),
        ({"classes": 100_001}, "classes is 100001"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"fill_rate": 0.0}, "fill rate is 0"),
        ({"fill_rate": 0.39}, "fill rate is 0.39"),
        ({"fill_rate": float("nan")}, "fill rate is nan"),
    ],
)
def test_what_cannot_be_searched_is_refused(options: dict[str, float], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        search_categories(**{"classes": 1, **options})
