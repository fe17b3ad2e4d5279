"""Whatever renders, the same dataset: slices, a Dask cluster that loses workers, executors that fail."""

import copy
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import Any

import dask
import pytest
from click.testing import CliRunner, Result
from distributed import Client, LocalCluster

from fractalgen import make_recipe
from fractalgen.build import plan_build, run_build
from fractalgen.cli import main
from fractalgen.executors import open_engine
from fractalshards.errors import FractalError, WorkerLostError
from fractalshards.manifest import load_manifest

_CLUSTER = """
import threading
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        print(cluster.scheduler_address, flush=True)
        threading.Event().wait()
"""


def wait_for(holds: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        pass


def without_workers(options: list[str]) -> list[str]:
    return [option for option in options if option not in ("--workers", "1")]


def run(*arguments: object, environment: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env=environment)


def same(folder: Path, other: Path) -> bool:
    return load_manifest(folder).content_digest() == load_manifest(other).content_digest()


def test_slices_build_the_dataset_and_the_last_writes_the_manifest(
    built: Path, small: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "sliced"
    first = run(*small, "--out", out, "--slice", "2/3")
    assert first.exit_code == 0, first.output
    assert "slice 2/3 is done; the manifest waits for 4 shards of other slices" in first.stdout
    assert sorted(path.name for path in out.glob("*.tar")) == ["train-000001.tar", "train-000004.tar"]
    array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "2"}
    for task in ("2", "0"):
        assert not (out / "_info.json").exists()
        result = run(*small, "--out", out, "--slice", "auto", environment={**array, "SLURM_ARRAY_TASK_ID": task})
        assert result.exit_code == 0, result.output
    assert same(out, built)
    again = run(*small, "--out", out, "--slice", "3/3")
    assert "nothing to render, all 2 shards of slice 3/3 there already" in again.stderr


def test_a_build_without_slice_does_what_slices_left(built: Path, small: list[str], tmp_path: Path) -> None:
    out = tmp_path / "sliced"
    assert run(*small, "--out", out, "--slice", "1/2").exit_code == 0
    result = run(*small, "--out", out)
    assert "to render: 63 images in 3 shards (3 done)" in result.stderr
    assert same(out, built)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """Two Dask workers, processes whose nannies start them anew."""
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster


def test_a_dask_cluster_that_loses_a_worker_builds_the_same(
    small: list[str], tmp_path: Path, cluster: LocalCluster
) -> None:
    options = [*small, "--n", "400", "--points", "200000", "--shard-size", "20"]
    local, out = tmp_path / "local", tmp_path / "dask"
    assert run(*options, "--out", local).exit_code == 0
    killed = threading.Event()

    def kill_a_worker() -> None:
        with Client(cluster) as client:
            process = next(iter(client.run(os.getpid).values()))
            wait_for(lambda: len(list(out.glob("*.json"))) >= 3)
            if not (out / "_info.json").exists():  # else the build was over before
                os.kill(process, 9)
                killed.set()

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    result = run(
        *without_workers(options), "--out", out, "--executor", "dask", "--scheduler", cluster.scheduler_address
    )
    killer.join()
    assert killed.is_set()
    assert result.exit_code == 0, result.output
    assert "with 2 workers of tcp://" in result.stderr
    assert same(out, local)
    assert not list(out.glob(".tmp*"))


def test_dask_errors_are_one_line(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fractalgen.executors._SECONDS", 0.5)
    for options, code, words in (
        (["--executor", "dask"], 2, "needs --scheduler"),
        (["--scheduler", "tcp://localhost:1"], 2, "add --executor dask"),
        (["--executor", "dask", "--scheduler", "tcp://localhost:1", "--workers", "2"], 2, "leave it out"),
        (["--slice", ""], 2, "expected I/K"),
        (["--executor", "dask", "--scheduler", "tcp://127.0.0.1:1"], 1, "no Dask scheduler answers"),
    ):
        result = run(*without_workers(small), "--out", tmp_path / "out", *options)
        assert result.exit_code == code, result.output
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
        assert words in line
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("address", "reason"),
    [("nonsense://x", "unknown address scheme"), ("localhost", "missing port"), ("ucx://x:1", "don't know how to")],
)
def test_an_address_that_cannot_be_is_refused_without_a_client(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, reason: str
) -> None:
    """Dask leaves its client open then; when that is collected as another one starts, both wait until one gives up."""
    monkeypatch.setattr("distributed.Client", lambda *arguments, **named: pytest.fail("made a client"))
    options = [*without_workers(small), "--out", tmp_path / "out", "--executor", "dask"]
    result = run(*options, "--scheduler", address)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {address}: no Dask scheduler answers ({reason}")


def test_a_cluster_without_workers_is_refused(small: list[str], tmp_path: Path) -> None:
    with LocalCluster(n_workers=0, dashboard_address=":0") as empty:
        address = empty.scheduler_address
        result = run(*without_workers(small), "--out", tmp_path / "out", "--executor", "dask", "--scheduler", address)
    assert result.exit_code == 1
    assert "has no workers yet" in result.stderr


def test_a_scheduler_that_dies_ends_the_build_in_one_line(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        result = run(*without_workers(slow), "--out", out, "--executor", "dask", "--scheduler", address)
        killer.join()
    cluster.wait()
    assert result.exit_code == 1, result.output
    assert not isinstance(result.exception, BaseException) or isinstance(result.exception, SystemExit)
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert not (out / "_info.json").exists()


def test_a_worker_of_another_version_is_named(tmp_path: Path) -> None:
    """What an old worker makes of a recipe that it could not have made itself."""
    recipe = make_recipe("single", 20, classes=20, size=32, points=100)

    class Newer(Here):
        def submit(self, task: partial[Any], /, *args: Any, **named: Any) -> Future[Any]:
            folder, recipe, shard = task.args
            newer = copy.copy(recipe)
            object.__setattr__(newer, "version", recipe.version + 1)
            return super().submit(partial(task.func, folder, newer, shard))

    with pytest.raises(FractalError, match=r"renders recipe version .*; install the same version everywhere"):
        run_build(plan_build(tmp_path / "out", recipe, 1), Newer({}))


class Here(Executor):
    """Runs tasks in this thread, but fails those of some shards."""

    def __init__(self, errors: dict[str, BaseException]) -> None:
        self.errors = errors

    def submit(self, task: partial[Any], /, *args: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if error := self.errors.get(task.args[-1].name):
            future.set_exception(error)
        else:
            future.set_result(task(*args, **named))
        return future


@pytest.mark.parametrize("error", [WorkerLostError("killed"), MemoryError()], ids=repr)
def test_shards_that_cannot_be_had_are_listed_when_the_rest_is_built(
    built: Path, tmp_path: Path, error: BaseException
) -> None:
    out = tmp_path / "out"
    recipe = make_recipe("single", 110, val=13, classes=20, size=32, points=3000, shard_size=25)
    plan = plan_build(out, recipe, 1)
    with pytest.raises(FractalError, match=r"2 shards missing, train-000001.tar, val-000000.tar: ") as caught:
        run_build(plan, Here({"train-000001.tar": error, "val-000000.tar": error}))
    assert "\n" not in str(caught.value)
    assert len(list(out.glob("*.tar"))) == 4
    assert not (out / "_info.json").exists()
    with open_engine(1) as engine:
        run_build(plan_build(out, recipe, 1), engine.executor)
    assert same(out, built)


def test_a_folder_that_workers_do_not_see_is_named(tmp_path: Path) -> None:
    recipe = make_recipe("single", 20, classes=20, size=32, points=100)

    class Elsewhere(Here):
        def submit(self, task: partial[Any], /, *args: Any, **named: Any) -> Future[Any]:
            folder, *rest = task.args
            return super().submit(partial(task.func, folder / "not-mounted", *rest))

    with pytest.raises(FractalError, match=r"not-mounted: not there on .*; all workers need it under the same path"):
        run_build(plan_build(tmp_path / "out", recipe, 1), Elsewhere({}))
    shutil.rmtree(tmp_path / "out")
