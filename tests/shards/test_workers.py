"""The pool: a killed worker costs its own task one try; a first signal lets tasks finish, a second ends them."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest

from fractalshards import workers
from fractalshards.errors import WorkerLostError
from fractalshards.workers import TRIES, as_finished, worker_pool

# evaluated by a worker: appends to a file, then ends the process unless the file is longer than that
_DIE = "(open({0!r}, 'a').write('x'), __import__('os').path.getsize({0!r}) > {1} or {2})"
_KILL, _EXIT = "__import__('os').kill(__import__('os').getpid(), 9)", "__import__('os')._exit(9)"

# a task that prints when it begins, and ends when another process opens a pipe
_LONG_WORK = """
import sys
from fractalshards.workers import worker_pool
def task(pipe):
    print("begun", flush=True)
    open(pipe).close()
    print("finished", flush=True)
def main():
    with worker_pool(1) as pool:
        pool.submit(task, sys.argv[1]).result()
"""


def test_task_of_a_killed_worker_runs_again(tmp_path):
    visits = tmp_path / "visits"
    with worker_pool(2) as pool:
        dying = pool.submit(eval, _DIE.format(str(visits), TRIES - 1, _KILL))
        others = [pool.submit(pow, number, 2) for number in range(20)]
        assert [future.result(60) for future in others] == [number**2 for number in range(20)]
        assert dying.result(60)[1] is True
    assert visits.stat().st_size == TRIES


@pytest.mark.parametrize(("end", "noun", "memory"), [(_KILL, "SIGKILL", True), (_EXIT, "exit code 9", False)])
def test_task_is_lost_after_three_deaths(tmp_path, end, noun, memory):
    visits = tmp_path / "visits"
    with worker_pool(1) as pool:
        dying, after = pool.submit(eval, _DIE.format(str(visits), 99, end)), pool.submit(pow, 2, 3)
        with pytest.raises(WorkerLostError, match=noun) as lost:
            dying.result(60)
        assert ("memory" in str(lost.value)) == memory
        assert after.result(60) == 8
    assert visits.stat().st_size == TRIES


@pytest.mark.parametrize(
    ("membership", "files", "quotas"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, [2]),  # version 2, in a container
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "400000 100000", "cpu.max": "50000 100000"}, [4, 1]),
        ("3:memory:/m\n2:cpu,cpuacct:/d", {"cpu/d/cpu.cfs_quota_us": "30000", "cpu/d/cpu.cfs_period_us": "10000"}, [3]),
        ("1:cpu:/d", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, []),
        ("0::/", {"cpu.max": ""}, []),
    ],
)
def test_cores_are_limited_by_cpu_quotas(tmp_path, membership, files, quotas):
    for name, text in files.items():
        (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / name).write_text(text + "\n")
    (tmp_path / "cgroup").write_text(membership + "\n")
    assert list(workers._cpu_quotas(tmp_path / "cgroup", tmp_path / "mount")) == quotas


def test_error_of_a_task_cancels_pending_ones():
    futures: list[Future[object]] = []

    def work() -> None:
        with worker_pool(1) as pool:
            futures.append(pool.submit(eval, "1 / 0"))
            futures.extend(pool.submit(time.sleep, 0.05) for _ in range(100))
            futures[0].result(60)

    with pytest.raises(ZeroDivisionError):
        work()
    assert futures[-1].cancelled()
    assert not any(future.running() for future in futures)


def start(tmp_path: Path) -> subprocess.Popen[str]:
    (tmp_path / "long_work.py").write_text(_LONG_WORK)
    script = tmp_path / "script.py"
    script.write_text("import long_work\nlong_work.main()\n")  # without a guard: workers must not run it
    os.mkfifo(tmp_path / "pipe")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, script, tmp_path / "pipe"]
    process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
    assert process.stdout.readline() == "begun\n"
    return process


@pytest.mark.parametrize(("number", "words"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "Terminated")])
def test_signal_to_all_processes_lets_running_tasks_finish(tmp_path, number, words):
    process = start(tmp_path)
    os.killpg(process.pid, number)
    assert "stopping" in process.stderr.readline()
    (tmp_path / "pipe").write_text("")
    out, errors = process.communicate(timeout=60)
    assert out == "finished\n"
    assert words in errors.splitlines()[-1]
    assert errors.count("Traceback") == 1, "workers print nothing"


def test_second_signal_ends_all_processes_at_once(tmp_path):
    process = start(tmp_path)
    process.send_signal(signal.SIGINT)
    assert "stopping" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT
    assert process.stderr.read() == ""  # to the end: all writers of the pipe are gone


def test_signal_while_a_lock_is_taken_ends_the_pool(monkeypatch):
    """At each such moment of the main thread in turn: the lock would stay locked, and a thread would wait for it."""
    enter, before = threading.Condition.__enter__, 0

    def interrupt(lock: threading.Condition) -> None:
        nonlocal before
        enter(lock)
        if threading.get_ident() == threading.main_thread().ident:
            before -= 1
            if before == 0:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(threading.Condition, "__enter__", interrupt)
    for moment in count(1):
        before = moment
        with suppress(KeyboardInterrupt), worker_pool(1) as pool:
            futures = [pool.submit(pow, 2, 3) for _ in range(2)]
            assert [future.result() for future in as_finished(futures)] == [8, 8]
            before = 0
            break
    assert moment > 4


def test_pool_needs_no_more_threads_than_workers(monkeypatch):
    """Threads of threads could not start under a limit of processes, and others would wait for them forever."""
    start = threading.Thread.start

    def start_from_main(thread: threading.Thread) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_from_main)
    with worker_pool(2) as pool:
        assert pool.submit(pow, 2, 3).result(60) == 8


def test_pool_starts_no_more_workers_than_tasks():
    with worker_pool(8) as pool:
        assert len({pool.submit(os.getpid).result(60) for _ in range(5)}) == 1


def test_workers_end_with_a_killed_parent(tmp_path):
    process = start(tmp_path)
    process.kill()
    assert "Traceback" not in process.stderr.read()  # to the end: all writers of the pipe are gone
