"""``--set NAME=VALUE`` onto dataclasses, and ``--slice`` for job arrays."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

from fractalshards.errors import UsageError
from fractalshards.settings import Slice, nearest, override, parse_settings, parse_slice


@dataclass(frozen=True)
class Record:
    name: str = "fixed"
    count: int = 1
    rate: float = 0.5
    wanted: bool = True
    mode: Literal["slow", "fast"] = "slow"
    decay: float | None = None
    pair: tuple[int, int] = (2, 4)
    px: ClassVar[str] = "unit"


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
def test_override_of_every_type(text: str, value: object) -> None:
    changes = parse_settings([text])
    (name,) = changes
    assert getattr(override(Record(), changes, fixed=("name",)), name) == value


@pytest.mark.parametrize(
    "text",
    [
        *("count", "=3", "count=1.5", "rate=x", "rate=inf", "wanted=2", "mode=medium", "pair=1,2,3", "decay=x"),
        *("conut=3", "xyz=3", "name=x", "px=x"),
    ],
)
def test_override_rejects(text: str) -> None:
    with pytest.raises(UsageError, match=text.partition("=")[0] or "--set") as caught:
        override(Record(), parse_settings([text]), fixed=("name",))
    assert ("'count'" in str(caught.value)) == (text == "conut=3")


def test_nearest_suggests_names_with_this_beginning_or_alike() -> None:
    names = ["lr", "blur_sigma", "blur_probability"]
    assert nearest("blur", names) == ", did you mean 'blur_sigma' or 'blur_probability'?"
    assert nearest("blur_sgima", names) == ", did you mean 'blur_sigma'?"
    assert nearest("x", names) == " (there are lr, blur_sigma, blur_probability)"


def test_parse_settings_keeps_the_last() -> None:
    assert parse_settings(["a=1", "b=2", "a=3=4"]) == {"a": "3=4", "b": "2"}


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_slices_hold_every_task_once(count: int) -> None:
    parts = [Slice(index, count).of(tuple(range(13))) for index in range(1, count + 1)]
    assert sorted(task for part in parts for task in part) == list(range(13))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def slurm(number: int, first: int, last: int, step: int | None = None) -> dict[str, str]:
    values = {"ID": number, "MIN": first, "MAX": last, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items() if value is not None}


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("3/10", {}, Slice(3, 10)),
        ("1/1", {"SLURM_ARRAY_TASK_ID": "7"}, Slice(1, 1)),
        ("auto", slurm(0, 0, 9), Slice(1, 10)),
        ("auto", slurm(9, 0, 9), Slice(10, 10)),
        ("auto", slurm(7, 3, 11, 4), Slice(2, 3)),
        ("auto/9", slurm(2, 2, 2), Slice(2, 9)),
        (
            "auto",
            {"SGE_TASK_ID": "4", "SGE_TASK_FIRST": "2", "SGE_TASK_LAST": "8", "SGE_TASK_STEPSIZE": "2"},
            Slice(2, 4),
        ),
        ("auto/5", {"PBS_ARRAY_INDEX": "5"}, Slice(5, 5)),
        ("auto/5", {"PBS_ARRAYID": "1"}, Slice(1, 5)),
    ],
    ids=str,
)
def test_parse_slice(text: str, environment: dict[str, str], expected: Slice) -> None:
    assert parse_slice(text, environment) == expected


@pytest.mark.parametrize(
    ("text", "environment"),
    [
        *((text, {}) for text in ("0/3", "4/3", "1/0", "3", "-1/3", "auto/x", "auto")),
        ("auto", {"SGE_TASK_ID": "undefined"}),
        ("auto", {"PBS_ARRAY_INDEX": "3"}),
        ("auto/3", {"PBS_ARRAY_INDEX": "0"}),
    ],
    ids=str,
)
def test_parse_slice_rejects(text: str, environment: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"--slice|PBS_ARRAY_INDEX") as caught:
        parse_slice(text, environment)
    assert "\n" not in str(caught.value)
