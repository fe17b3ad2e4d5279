"""Handlers of signals for a while. It imports little, for commands have some from their first moment on."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, NoReturn, ParamSpec, TypeVar

from fractalshards.errors import Terminated, WorkerLostError


@contextmanager
def handling(handler: Callable[[int, FrameType | None], object], *signals: signal.Signals) -> Iterator[None]:
    """Inside the block the signals call ``handler``; only in the main thread, for others cannot handle any."""
    here = signals if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, handler) for number in here}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


TRIES = 3  # of a task whose worker is killed

# Read by the workers when they start: they are as many as the cores already, and glibc shall keep memory for the next
# image instead of giving it back, for new pages cost as much as the rendering.
_ENVIRONMENT = {
    "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",  # of multiprocessing, whose parent was killed
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the most that older versions take
}
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 0.05  # seconds
_SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it

OnProgress = Callable[[int, int], None]  # called with how much is done, and of how much

_P = ParamSpec("_P")
_T = TypeVar("_T")


def no_progress(done: int, total: int) -> None:
    """Ignore progress."""


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor]:
    """An executor of up to so many processes, which start as there are tasks for them.

    What has not begun when the block ends is given up, what runs is waited for.

    SIGTERM, which batch systems send, ends the block as Ctrl-C does. A second signal while running tasks are waited
    for ends the process at once.

    Workers are spawned, not forked: only then does the end of the parent, even by SIGKILL, reach every one of them.
    A task whose worker is killed is given to a new worker; its future fails with ``WorkerLostError`` when that has
    happened three times.
    """
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    resource_tracker.ensure_running()  # else the first thread would start it, which unblocks its signals
    pool = _Pool(workers)
    try:
        with sigterm_interrupts():
            yield pool
    finally:
        with handling(_stop_at_once, *_SIGNALS):
            error = sys.exc_info()[1]
            if error and pool.running():
                again = " again" if isinstance(error, KeyboardInterrupt) else ""
                print(f"stopping when what has begun is finished; press Ctrl-C{again} to stop at once", file=sys.stderr)
            pool.shutdown(cancel_futures=True)
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside the block SIGTERM does what Ctrl-C does: it raises ``Terminated``, a KeyboardInterrupt."""
    with handling(_terminate, signal.SIGTERM):
        yield


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def is_lost(error: BaseException) -> bool:
    """Whether a task failed because its workers died, memory ran out or the cluster gave it up: others may succeed."""
    distributed = sys.modules.get("distributed")
    killed = (distributed.KilledWorker,) if distributed else ()
    return isinstance(error, (WorkerLostError, MemoryError, CancelledError, *killed))


def end_with_parent() -> None:
    """Called in a child process: from now on it ends when its parent does, by SIGKILL too."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()


class _Pool(Executor):
    """Threads, each with a worker process of its own: so it is known whose task a killed worker had.

    ``ProcessPoolExecutor`` alone gives up all tasks when one worker is killed, and does not tell which had it.
    """

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers, initializer=_block_signals)
        self._own = threading.local()
        self._processes: set[ProcessPoolExecutor] = set()
        self._futures: set[Future[Any]] = set()

    def submit(self, task: Callable[_P, _T], /, *args: _P.args, **named: _P.kwargs) -> Future[_T]:
        future = self._threads.submit(lambda: self._run(task, *args, **named))
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        return future

    def running(self) -> bool:
        """Whether a task has begun and is not finished."""
        return any(future.running() for future in list(self._futures))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._threads.shutdown(wait=False, cancel_futures=cancel_futures)
        while wait and self.running():
            time.sleep(_PATIENCE)  # joining a thread may miss a signal that comes just before
        self._threads.shutdown(wait)
        for process in list(self._processes):
            process.shutdown(wait)

    def _run(self, task: Callable[_P, _T], *args: _P.args, **named: _P.kwargs) -> _T:
        for _ in range(TRIES):
            process = self._process()
            try:
                return process.submit(task, *args, **named).result()
            except BrokenProcessPool:
                process.shutdown()
                self._processes.discard(process)
                self._own.process = None
        raise WorkerLostError(f"a worker process was killed {TRIES} times at this; if memory ran out, lower --workers")

    def _process(self) -> ProcessPoolExecutor:
        """This thread's worker."""
        process: ProcessPoolExecutor | None = getattr(self._own, "process", None)
        if process is None:
            context = multiprocessing.get_context("spawn")
            process = self._own.process = ProcessPoolExecutor(1, mp_context=context, initializer=end_with_parent)
            self._processes.add(process)
        return process


def _block_signals() -> None:
    """In a thread that starts workers, which inherit it from their first instruction on.

    Ctrl-C at a terminal and the SIGTERM of some batch systems go to all processes at once; only the parent shall act.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _stop_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """End the process while it waits for its workers: they follow, and leave nothing that looks finished."""
    if sys.stderr.isatty():
        os.write(2, _SHOW_CURSOR.encode())
    os.write(2, b"error: stopped at once; what was finished before is kept, run the same command again to go on\n")
    os._exit(128 + number)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
