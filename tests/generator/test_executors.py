"""Slices, executors that fail, and Dask clusters that lose workers: the same dataset, or one line that says why not."""

import copy
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from fractalgen import make_recipe
from fractalgen.build import open_folder, plan_build, run_build
from fractalgen.cli import main
from fractalshards.errors import FractalError, WorkerLostError
from fractalshards.manifest import load_manifest

RECIPE = make_recipe("single", 110, val=13, classes=20, size=32, points=3000, shard_size=25)  # that of ``built``
_CLUSTER = """
import threading
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        print(cluster.scheduler_address, flush=True)
        threading.Event().wait()
"""


def wait_for(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)


def run(*arguments: object, environment: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env=environment)


def content(folder: Path) -> str:
    return load_manifest(folder).content_digest()


def test_slices_make_the_dataset_of_one_build(built: Path, small: list[str], tmp_path: Path, threads: None) -> None:
    out = tmp_path / "sliced"
    first = run(*small, "--out", out, "--slice", "2/3")
    assert first.exit_code == 0, first.output
    assert "slice 2/3" in first.stdout
    assert sorted(path.name for path in out.glob("*.tar")) == ["train-000001.tar", "train-000004.tar"]
    array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "2"}
    for task in ("2", "0"):
        assert not (out / "_info.json").exists()
        result = run(*small, "--out", out, "--slice", "auto", environment={**array, "SLURM_ARRAY_TASK_ID": task})
        assert result.exit_code == 0, result.output
    assert content(out) == content(built)
    assert "nothing to render, all 2 shards of slice 3/3" in run(*small, "--out", out, "--slice", "3/3").stderr


class Here(Executor):
    """Runs tasks in this thread, fails those of some shards, and may change the arguments of others."""

    def __init__(self, errors: dict[str, BaseException], change: Callable[..., tuple[Any, ...]] | None = None) -> None:
        self.errors = errors
        self.change = change

    def submit(self, task: partial[Any], /, *args: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        arguments = self.change(*task.args) if self.change else task.args
        if error := self.errors.get(arguments[-1].name):
            future.set_exception(error)
        else:
            future.set_result(task.func(*arguments))
        return future


@pytest.mark.parametrize("error", [WorkerLostError("killed"), MemoryError()], ids=repr)
def test_lost_shards_are_named_after_the_rest_is_built(built: Path, tmp_path: Path, error: BaseException) -> None:
    out = tmp_path / "out"
    with pytest.raises(FractalError, match=r"2 shards missing, train-000001.tar, val-000000.tar: ") as caught:
        run_build(plan_build(open_folder(out, RECIPE)), Here({"train-000001.tar": error, "val-000000.tar": error}))
    assert "\n" not in str(caught.value)
    assert len(list(out.glob("*.tar"))) == 4
    assert not (out / "_info.json").exists()
    with ThreadPoolExecutor(1) as pool:
        run_build(plan_build(open_folder(out, RECIPE)), pool)
    assert content(out) == content(built)


def test_worker_of_another_version_is_named(tmp_path: Path) -> None:
    def newer(folder: Path, recipe: Any, task: Any) -> tuple[Any, ...]:
        other = copy.copy(recipe)
        object.__setattr__(other, "version", recipe.version + 1)  # what an old worker unpickles
        return folder, other, task

    with pytest.raises(FractalError, match="recipe version"):
        run_build(plan_build(open_folder(tmp_path / "out", RECIPE)), Here({}, newer))


def test_folder_that_workers_do_not_see_is_named(tmp_path: Path) -> None:
    elsewhere = Here({}, lambda folder, *others: (folder / "not-mounted", *others))
    with pytest.raises(FractalError, match="not-mounted"):
        run_build(plan_build(open_folder(tmp_path / "out", RECIPE)), elsewhere)


def test_dask_options_are_refused_in_one_line(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client of a malformed address is never made: Dask leaves it open, and the next client waits for it."""
    monkeypatch.setattr("distributed.Client", lambda *arguments, **named: pytest.fail("made a client"))
    for options, code, noun in (
        (["--executor", "dask"], 2, "--scheduler"),
        (["--scheduler", "tcp://localhost:1"], 2, "--executor dask"),
        (["--executor", "dask", "--scheduler", "tcp://localhost:1", "--workers", "2"], 2, "--workers"),
        (["--executor", "dask", "--scheduler", "nonsense://x"], 1, "nonsense://x"),
        (["--executor", "dask", "--scheduler", "localhost"], 1, "localhost"),
    ):
        result = run(*small, "--out", tmp_path / "out", *options)
        assert result.exit_code == code, result.output
        (line,) = result.stderr.splitlines()
        assert noun in line
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_dask_scheduler_that_does_not_answer(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr("fractalgen.executors._CONNECT_SECONDS", 0.5)
    dask = [*small, "--out", tmp_path / "out", "--executor", "dask", "--scheduler"]
    with LocalCluster(n_workers=0, dashboard_address=":0") as empty:
        for address in ("tcp://127.0.0.1:1", empty.scheduler_address):
            result = run(*dask, address)
            assert result.exit_code == 1
            assert address in result.stderr.splitlines()[-1]


@pytest.mark.slow
def test_dask_cluster_that_loses_a_worker_builds_the_same(small: list[str], tmp_path: Path) -> None:
    from distributed import Client, LocalCluster

    options = [*small, "--n", "400", "--points", "200000", "--shard-size", "20"]
    local, out = tmp_path / "local", tmp_path / "dask"
    assert run(*options, "--out", local).exit_code == 0
    killed = threading.Event()

    def kill_a_worker() -> None:
        with Client(cluster) as client:
            process = next(iter(client.run(os.getpid).values()))
            wait_for(lambda: len(list(out.glob("*.json"))) >= 3)
            if not (out / "_info.json").exists():
                os.kill(process, 9)
                killed.set()

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        killer = threading.Thread(target=kill_a_worker)
        killer.start()
        result = run(*options, "--out", out, "--executor", "dask", "--scheduler", cluster.scheduler_address)
        killer.join()
    assert killed.is_set()
    assert result.exit_code == 0, result.output
    assert "2 workers of tcp://" in result.stderr
    assert content(out) == content(local)
    assert not list(out.glob(".tmp*"))


@pytest.mark.slow
def test_dask_scheduler_that_dies_ends_the_build_in_one_line(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dask

    monkeypatch.setattr("fractalgen.executors._LOST_SECONDS", 1.0)
    out = tmp_path / "out"
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        cluster = subprocess.Popen([sys.executable, "-c", _CLUSTER], stdout=subprocess.PIPE, text=True)
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()

        def kill() -> None:
            wait_for(lambda: list(out.glob("*.json")))
            cluster.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        slow = [*small, "--n", "400", "--points", "1000000"]
        result = run(*slow, "--out", out, "--executor", "dask", "--scheduler", address)
        killer.join()
    cluster.wait()
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit | None)
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert not (out / "_info.json").exists()
