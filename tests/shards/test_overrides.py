"""``--set NAME=VALUE``: every type of field, and one line for whatever does not fit."""

from dataclasses import dataclass
from typing import Literal

import pytest

from fractalshards.errors import UsageError
from fractalshards.settings import nearest, override, parse_settings


@dataclass(frozen=True)
class Record:
    name: str = "fixed"
    count: int = 1
    rate: float = 0.5
    wanted: bool = True
    mode: Literal["slow", "fast"] = "slow"
    decay: float | None = None
    pair: tuple[int, int] = (2, 4)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("count=7", 7),
        ("rate=1e-3", 1e-3),
        ("wanted=no", False),
        ("wanted=True", True),
        ("mode=fast", "fast"),
        ("decay=0.1", 0.1),
        ("decay=none", None),
        ("pair=3, 5", (3, 5)),
        ("pair=3", (3, 3)),
    ],
)
def test_every_type_is_read(text: str, value: object) -> None:
    changes = parse_settings([text])
    (name,) = changes
    assert getattr(override(Record(), changes, fixed=("name",)), name) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("count", "expected NAME=VALUE"),
        ("=3", "expected NAME=VALUE"),
        ("count=1.5", "expected an integer"),
        ("rate=x", "expected a number"),
        ("rate=inf", "expected a finite number"),
        ("wanted=2", "expected true or false"),
        ("mode=medium", "expected slow or fast"),
        ("pair=1,2,3", "expected one value, or 2"),
        ("decay=x", "expected a number"),
        ("conut=3", "did you mean 'count'"),
        ("xyz=3", r"unknown parameter 'xyz' \(there are count, rate, "),
        ("name=x", "unknown parameter 'name'"),
    ],
)
def test_what_does_not_fit_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        override(Record(), parse_settings([text]), fixed=("name",))


def test_names_that_begin_like_a_mistyped_one_are_suggested() -> None:
    assert nearest("blurr", ["lr"]) == " (there are lr)"
    assert nearest("blurr", ["lr", "blur_sigma", "blur_probability"]) == (
        ", did you mean 'blur_sigma' or 'blur_probability'?"
    )


def test_the_last_of_two_settings_counts() -> None:
    assert parse_settings(["a=1", "b=2", "a=3=4"]) == {"a": "3=4", "b": "2"}
