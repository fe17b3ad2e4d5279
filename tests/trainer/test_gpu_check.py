"""``tools/gpu_check.py``: rehearsed on a CPU, and out of time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "gpu_check.py"


def check(folder: Path, *options: str) -> tuple[int, dict, str]:
    """Run it; return the exit code, its JSON and its page."""
    temporary = folder / "tmp"
    temporary.mkdir()
    command = [sys.executable, TOOL, "--device", "cpu", "--out", folder / "out", *options]
    environment = os.environ | {"TMPDIR": str(temporary), "XDG_CACHE_HOME": str(folder / "cache")}
    ended = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    assert list(temporary.glob("gpu-check-*")) == []
    texts = [(folder / "out" / f"gpu_check.{kind}").read_text() for kind in ("json", "md")]
    return ended.returncode, json.loads(texts[0]), texts[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_everything_runs_on_a_cpu(tmp_path):
    code, results, page = check(tmp_path, "--minutes", "19")
    assert {name: part["problem"] for name, part in results["parts"].items()} == dict.fromkeys(results["parts"], "")
    assert code == 0
    assert {"data", "tests", "speed", "study"} == {*results["parts"]}
    outcomes = [test["outcome"] for test in results["tests"]]
    assert {*outcomes} == {"passed", "skipped"}
    assert outcomes.count("passed") > 15
    assert {*results["speed"][0]["feeds"]} == {"shards", "rendered"}
    assert len(results["study"]) == 3
    assert all(run["result"] and run["images_per_s"] > 0 for run in results["study"])
    for noun in ("test_collectives", "test_resnet", "ft/digits-2-per-class-0--single--test_vit--seed0"):
        assert noun in page


def test_parts_that_do_not_fit_are_not_run(tmp_path):
    code, results, page = check(tmp_path, "--minutes", "0.27")
    assert code == 0
    assert {part["problem"].partition(":")[0] for part in results["parts"].values()} == {"not run"}
    assert page.count("not run") == len(results["parts"])
