"""Every option of ``fractalshards`` that other tests do not need: that it does what its help says."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from fractalshards import cli, pack, verify
from fractalshards import diff as compare
from fractalshards import report as survey
from fractalshards.manifest import INFO
from recorded_pools import RecordedPools


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> RecordedPools:
    """Threads instead of processes, on a machine of five cores."""
    recorded = RecordedPools()
    for module in (verify, compare, survey, pack):
        monkeypatch.setattr(module, "worker_pool", recorded)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(5)))
    return recorded


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def commands(dataset: Path, flowers: Path, out: Path) -> dict[str, list[object]]:
    """A command line of every command that says what it is doing."""
    other = shutil.copytree(dataset, out / "other")
    info = json.loads((other / INFO).read_text())
    info["splits"]["train"]["content_digests"][0] = "0" * 32  # so that images are read
    (other / INFO).write_text(json.dumps(info))
    return {
        "verify": [dataset],
        "report": [dataset, "--out", out / "page.html"],
        "diff": [dataset, other],
        "push": [dataset, out / "pushed"],
        "pull": [dataset, out / "pulled"],
        "pack": [f"imagefolder:{flowers}", out / "packed"],
    }


@pytest.mark.parametrize("command", ["verify", "report", "diff", "push", "pull", "pack"])
def test_quiet_is_quiet(
    command: str, dataset: Path, flowers: Path, tmp_path_factory: pytest.TempPathFactory, pools: RecordedPools
) -> None:
    loud, quiet = (
        run(command, *commands(dataset, flowers, tmp_path_factory.mktemp("out"))[command], *options)
        for options in ([], ["--quiet"])
    )
    assert loud.exit_code == quiet.exit_code, quiet.output
    results = [line for line in loud.stdout.splitlines() if not line.startswith("next: ")]
    assert len(results) == quiet.stdout.count("\n") > 0
    assert (bool(loud.stderr), quiet.stderr) == (True, "")


@pytest.mark.parametrize("command", ["verify", "report", "diff", "pack"])
def test_workers_are_as_many_as_asked_for(
    command: str, dataset: Path, flowers: Path, tmp_path: Path, pools: RecordedPools
) -> None:
    arguments = commands(dataset, flowers, tmp_path)[command]
    run(command, *arguments, "--workers", 3)
    assert set(pools.sizes) == {3}
    run(command, *arguments)
    assert set(pools.sizes) >= {3, 5} or command == "pack"  # which has nothing left to do, but opens a pool


@pytest.mark.parametrize("command", ["push", "pull"])
def test_jobs_are_passed_on(command: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def move(source: object, target: object, shards: object, jobs: int, progress: object) -> SimpleNamespace:
        seen.append(jobs)
        return SimpleNamespace(summary=lambda: "moved")

    monkeypatch.setattr(cli, f"{command}_dataset", move)
    for options in ([], ["--jobs", 3]):
        assert run(command, dataset, tmp_path / "out", *options).exit_code == 0
    assert seen == [8, 3]


def test_a_sheet_has_the_rows_columns_tiles_and_split_that_were_asked_for(packed: Path, tmp_path: Path) -> None:
    def sheet(*options: object) -> np.ndarray:
        result = run("sheet", packed, "--out", tmp_path / "sheet.png", *options)
        assert result.exit_code == 0, result.output
        classes = options[options.index("--classes") + 1]
        assert result.output.endswith(f" pixels, {classes} of 3 classes\n")
        with Image.open(tmp_path / "sheet.png") as picture:
            return np.asarray(picture)

    plain = sheet("--classes", 2, "--per-class", 1, "--tile", 24)
    assert plain.shape == (2 * 28 + 4, 44 + 28, 3)
    assert sheet("--classes", 3, "--per-class", 1, "--tile", 24).shape[0] == plain.shape[0] + 28
    assert sheet("--classes", 2, "--per-class", 2, "--tile", 24).shape[1] == plain.shape[1] + 28
    held_out = sheet("--classes", 2, "--per-class", 1, "--tile", 24, "--split", "val")
    assert held_out.shape == plain.shape
    assert not np.array_equal(held_out, plain)
