"""Slices of job arrays: every shard belongs to one, whatever the batch system calls it."""

import pytest

from fractalshards.errors import UsageError
from fractalshards.slices import Slice, parse_slice
from fractalshards.writer import ShardTask


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_every_shard_is_in_one_slice(count: int) -> None:
    tasks = tuple(ShardTask("train", f"train-{i:06d}.tar", 10 * i, 10 * i + 10) for i in range(13))
    parts = [Slice(index, count).of(tasks) for index in range(1, count + 1)]
    assert sorted((task for part in parts for task in part), key=lambda task: task.first) == list(tasks)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("3/10", {}, Slice(3, 10)),
        ("1/1", {"SLURM_ARRAY_TASK_ID": "7"}, Slice(1, 1)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "9"}, Slice(1, 10)),
        ("auto", {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "9"}, Slice(10, 10)),
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "7",
                "SLURM_ARRAY_TASK_MIN": "3",
                "SLURM_ARRAY_TASK_MAX": "11",
                "SLURM_ARRAY_TASK_STEP": "4",
            },
            Slice(2, 3),
        ),
        (
            "auto",
            {"SGE_TASK_ID": "4", "SGE_TASK_FIRST": "2", "SGE_TASK_LAST": "8", "SGE_TASK_STEPSIZE": "2"},
            Slice(2, 4),
        ),
        ("auto/5", {"PBS_ARRAY_INDEX": "5"}, Slice(5, 5)),
        ("auto/5", {"PBS_ARRAYID": "1"}, Slice(1, 5)),
        ("auto/9", {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_MAX": "2"}, Slice(2, 9)),
    ],
    ids=str,
)
def test_what_a_slice_is_called(text: str, environment: dict[str, str], expected: Slice) -> None:
    assert parse_slice(text, environment) == expected


@pytest.mark.parametrize(
    ("text", "environment", "words"),
    [
        ("0/3", {}, "part 0 of 3: expected 1 to 3"),
        ("4/3", {}, "part 4 of 3"),
        ("1/0", {}, "part 1 of 0"),
        ("3", {}, "expected I/K, auto or auto/K"),
        ("-1/3", {}, "expected I/K"),
        ("auto/x", {"PBS_ARRAY_INDEX": "1"}, "expected I/K"),
        ("auto", {}, "no task of a job array"),
        ("auto", {"SGE_TASK_ID": "undefined"}, "no task of a job array"),
        ("auto", {"PBS_ARRAY_INDEX": "3"}, "PBS_ARRAY_INDEX comes without the number of tasks; give --slice auto/K"),
        ("auto/3", {"PBS_ARRAY_INDEX": "0"}, "PBS_ARRAY_INDEX says part 0 of 3"),
    ],
    ids=str,
)
def test_what_is_no_slice(text: str, environment: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        parse_slice(text, environment)
    assert "\n" not in str(caught.value)
