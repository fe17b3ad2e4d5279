"""Slices, failing executors, and Dask clusters that lose workers give the same dataset, or an error in one line."""

import copy
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from building import RECIPE, SMALL, run, succeed, wait_until
from fractalgen.build import open_folder, plan_build, run_build
from fractalshards.errors import FractalError, WorkerLostError
from fractalshards.manifest import load_manifest
from packing import assert_refused

_CLUSTER = """
import threading
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        print(cluster.scheduler_address, flush=True)
        threading.Event().wait()
"""


def content(folder: Path) -> str:
    return load_manifest(folder).content_digest()


def test_slices_make_the_dataset_of_one_build(built, tmp_path, threads):
    out = tmp_path / "sliced"
    assert "slice 2/3" in succeed(*SMALL, "--out", out, "--slice", "2/3").stdout
    assert sorted(path.name for path in out.glob("*.tar")) == ["train-000001.tar", "train-000004.tar"]
    array = {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "2"}
    for task in ("2", "0"):
        assert not (out / "_info.json").exists()
        succeed(*SMALL, "--out", out, "--slice", "auto", environment={**array, "SLURM_ARRAY_TASK_ID": task})
    assert content(out) == content(built)
    assert "2 shards of slice 3/3" in succeed(*SMALL, "--out", out, "--slice", "3/3").stderr


class InThisThread(Executor):
    """Run tasks in this thread; fail those of some shards, or change their arguments."""

    def __init__(self, errors: dict[str, Any] | None = None, change: Callable = lambda *arguments: arguments) -> None:
        self.errors, self.change = errors or {}, change

    def submit(self, job: partial[Any], /, *args: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        arguments = self.change(*job.args)
        if error := self.errors.get(arguments[-1].name):
            future.set_exception(error)
        else:
            future.set_result(job.func(*arguments))
        return future


@pytest.mark.parametrize("error", [WorkerLostError("killed"), MemoryError()], ids=repr)
def test_lost_shards_are_named_after_the_rest_is_built(built, tmp_path, error):
    out = tmp_path / "out"
    lost = InThisThread({"train-000001.tar": error, "val-000000.tar": error})
    with pytest.raises(FractalError, match=r"\A.*train-000001.tar, val-000000.tar.*\Z"):  # one line
        run_build(plan_build(open_folder(out, RECIPE)), lost)
    assert len(list(out.glob("*.tar"))) == 4
    assert not (out / "_info.json").exists()
    run_build(plan_build(open_folder(out, RECIPE)), InThisThread())
    assert content(out) == content(built)


def in_a_newer_version(folder: Path, recipe: Any, task: Any) -> tuple[Any, ...]:
    other = copy.copy(recipe)
    object.__setattr__(other, "version", recipe.version + 1)  # what an old worker unpickles
    return folder, other, task


def elsewhere(folder: Path, *others: Any) -> tuple[Any, ...]:
    return folder / "not-mounted", *others


@pytest.mark.parametrize(("change", "noun"), [(in_a_newer_version, "recipe version"), (elsewhere, "not-mounted")])
def test_worker_that_cannot_build_is_named(tmp_path, change, noun):
    with pytest.raises(FractalError, match=noun):
        run_build(plan_build(open_folder(tmp_path / "out", RECIPE)), InThisThread(change=change))


@pytest.mark.parametrize("address", ["nonsense://x", "localhost"])
def test_malformed_dask_address_is_named(tmp_path, monkeypatch, address):
    """No client is made for it: Dask would leave it open, and the next client would wait for it."""
    monkeypatch.setattr("distributed.Client", lambda *arguments, **named: pytest.fail("made a client"))
    result = run(*SMALL, "--out", tmp_path / "out", "--executor", "dask", "--scheduler", address)
    assert_refused(result, 1, address)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_dask_scheduler_that_does_not_answer_is_named(tmp_path, monkeypatch):
    from distributed import LocalCluster

    monkeypatch.setattr("fractalgen.executors._CONNECT_SECONDS", 0.5)
    dask = [*SMALL, "--out", tmp_path / "out", "--executor", "dask", "--scheduler"]
    with LocalCluster(n_workers=0, dashboard_address=":0") as empty:
        for address in ("tcp://127.0.0.1:1", empty.scheduler_address):
            assert_refused(run(*dask, address), 1, address)


@pytest.mark.slow
def test_dask_cluster_that_loses_a_worker_builds_the_same(tmp_path):
    from distributed import Client, LocalCluster

    options = [*SMALL, "--n", "400", "--points", "200000", "--shard-size", "20"]
    local, out = tmp_path / "local", tmp_path / "dask"
    succeed(*options, "--out", local)
    killed = threading.Event()

    def kill_a_worker() -> None:
        wait_until(lambda: len(list(out.glob("*.json"))) >= 3)
        if not (out / "_info.json").exists():
            os.kill(process, 9)
            killed.set()

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        with Client(cluster) as client:  # before the build, which may be quicker than a connection
            process = next(iter(client.run(os.getpid).values()))
        killer = threading.Thread(target=kill_a_worker)
        killer.start()
        result = succeed(*options, "--out", out, "--executor", "dask", "--scheduler", cluster.scheduler_address)
        killer.join()
    assert killed.is_set()
    assert "2 workers of tcp://" in result.stderr
    assert content(out) == content(local)
    assert not list(out.glob(".tmp*"))


@pytest.mark.slow
def test_dask_scheduler_that_dies_ends_the_build_in_one_line(tmp_path, monkeypatch, caplog):
    """Dask logs nothing during the build, and as before afterwards."""
    import dask
    import distributed

    loggers = [logging.getLogger(name) for name in (distributed.__name__, distributed.client.__name__)]
    levels = [logger.level for logger in loggers]
    out = tmp_path / "out"
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        cluster = subprocess.Popen([sys.executable, "-c", _CLUSTER], stdout=subprocess.PIPE, text=True)
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()

        def kill() -> None:
            wait_until(lambda: list(out.glob("*.json")))
            cluster.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        slow = [*SMALL, "--n", "400", "--points", "1000000"]
        result = run(*slow, "--out", out, "--executor", "dask", "--scheduler", address)
        killer.join()
    cluster.wait()
    assert_refused(result, 1)
    assert not [record for record in caplog.records if record.name.startswith("distributed")]
    assert [logger.level for logger in loggers] == levels
    assert not (out / "_info.json").exists()
