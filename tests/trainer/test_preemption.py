import signal
import subprocess
import sys
import threading

import pytest

from fractalshards.errors import StoppedError
from fractaltrain.preemption import signals_raise, stop_signals

BLOCKED = """
import ctypes, os, signal
from fractaltrain import preemption
preemption._GRACE = 0.3
lock = ctypes.create_string_buffer(64)
libc = ctypes.CDLL(None)
with preemption.stop_signals():
    libc.pthread_mutex_lock(lock)
    os.kill(os.getpid(), signal.{signal})
    libc.pthread_mutex_lock(lock)  # never returns, and no Python code runs in this thread any more
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_process_that_is_blocked_outside_of_python_ends_all_the_same():
    """As one does whose GPU waits for a process that is gone."""
    done = run(BLOCKED.format(signal="SIGTERM"))
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")


def test_signal_sets_a_mark_and_nothing_else():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    threads = threading.active_count()
    with stop_signals() as stop:
        assert list(stop.until_requested([1, 2])) == [1, 2]
        signal.raise_signal(signal.SIGUSR1)
        assert stop.number == signal.SIGUSR1
        assert list(stop.until_requested([1, 2])) == []
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1


def test_failure_after_sigterm_is_the_launchers_doing():
    """It ended this process because another one failed: there is nothing to report."""
    code = """
import signal
from fractaltrain.preemption import stop_signals
with stop_signals():
    signal.raise_signal(signal.SIGTERM)
    raise RuntimeError("Connection closed by peer")
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")


def test_sigterm_just_after_the_failure_is_not_lost():
    """Both tell of the same death, at about the same time."""
    code = """
import signal
from fractaltrain.preemption import stop_signals

handle = signal.signal

def give_back(number, handler):
    signal.signal = handle
    signal.raise_signal(signal.SIGTERM)
    return handle(number, handler)

with stop_signals():
    signal.signal = give_back
    raise RuntimeError("Connection closed by peer")
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, "")


def test_failure_without_a_signal_is_a_failure():
    with pytest.raises(RuntimeError, match="a bug"), stop_signals():
        raise RuntimeError("a bug")


def test_other_threads_train_without_handling_signals():
    seen: list[int] = []

    def use() -> None:
        with stop_signals() as stop:
            seen.append(stop.number)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [0]


def test_ctrl_c_says_what_becomes_of_the_run():
    with pytest.raises(StoppedError, match="Ctrl-C, which saves nothing; the same command") as caught, signals_raise():
        signal.raise_signal(signal.SIGINT)
    assert caught.value.code == 130


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_signal_inside_a_finalizer_ends_the_run_before_its_first_step():
    """Python drops what a handler raises there."""

    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGUSR1)

    reached = []

    def run_with_a_signal() -> None:
        with signals_raise():
            Finalized()
            reached.append("the loop")
            with stop_signals():
                reached.append("its first step")

    with pytest.raises(StoppedError, match="stopped by SIGUSR1; run the same command to continue") as caught:
        run_with_a_signal()
    assert (reached, caught.value.code) == (["the loop"], 75)
    with signals_raise(), stop_signals() as stop:
        assert stop.number == 0  # the next run in this process knows nothing of it
