"""A pool of worker processes that survives killed workers and stops in order on signals; progress callbacks."""

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from queue import LifoQueue
from types import FrameType
from typing import NoReturn, ParamSpec, TypeVar

from fractalshards.errors import Terminated, WorkerLostError

TRIES = 3  # of a task whose worker is killed

OnProgress = Callable[[int, int], None]  # called with (done, total)

# Workers read these when they start. There is a worker per core already, so BLAS gets one thread; and glibc keeps
# memory for the next image instead of returning it, because new pages cost as much as the rendering.
_ENVIRONMENT = {
    "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",  # of multiprocessing, when the parent is killed
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the largest value that older versions accept
}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals by which batch systems ask a training to save and end."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SHOW_CURSOR = "\x1b[?25h"  # progress bars hide it

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")


def no_progress(done: int, total: int) -> None:
    """Ignore progress."""


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor]:
    """Yield an executor of up to ``workers`` spawned processes, started as tasks are submitted.

    When the block ends, pending tasks are cancelled and running ones finish. SIGTERM ends the block as Ctrl-C does, by
    an exception; a second signal ends the process at once, and the workers with it.

    A task whose worker is killed runs again in a new worker; after three such deaths its future raises
    ``WorkerLostError``. Other tasks are not affected.
    """
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    resource_tracker.ensure_running()  # started here: a pool thread that starts it would unblock its signals
    pool = _Pool(workers)
    try:
        with sigterm_interrupts():
            yield pool
    finally:
        with handling(signal.SIG_DFL, *_SIGNALS):
            if isinstance(sys.exc_info()[1], KeyboardInterrupt):
                _warn_of_waiting()
            pool.shutdown(cancel_futures=True)
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Raise ``Terminated``, a KeyboardInterrupt, inside the block when SIGTERM arrives."""
    with handling(_terminate, signal.SIGTERM):
        yield


def is_lost(error: BaseException) -> bool:
    """Return whether dead workers, exhausted memory or the cluster made a task fail, so that others may succeed."""
    distributed = sys.modules.get("distributed")
    killed = (distributed.KilledWorker,) if distributed else ()
    return isinstance(error, (WorkerLostError, MemoryError, CancelledError, *killed))


def end_with_parent() -> None:
    """Make this child process exit when its parent does, however the parent ends."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()


class _Pool(Executor):
    """Threads that each run one task at a time in a process of their own.

    A shared ``ProcessPoolExecutor`` fails all tasks when one worker is killed, and does not say which one it ran.
    """

    def __init__(self, workers: int) -> None:
        self._threads = ThreadPoolExecutor(workers, initializer=_block_signals)
        self._processes: LifoQueue[ProcessPoolExecutor | None] = LifoQueue()  # idle, or None if not started yet
        for _ in range(workers):
            self._processes.put(None)

    def submit(self, task: Callable[_P, _T], /, *args: _P.args, **named: _P.kwargs) -> Future[_T]:
        return self._threads.submit(self._run, task, *args, **named)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        while not self._processes.empty():
            if process := self._processes.get():
                process.shutdown(wait)

    def _run(self, task: Callable[_P, _T], /, *args: _P.args, **named: _P.kwargs) -> _T:
        for _ in range(TRIES):
            process = self._processes.get() or _start_process()
            idle: ProcessPoolExecutor | None = process
            try:
                return process.submit(task, *args, **named).result()
            except BrokenProcessPool:
                _log.warning("a worker process was killed; its task runs again")
                process.shutdown()
                idle = None
            finally:
                self._processes.put(idle)
        raise WorkerLostError(f"the worker process was killed {TRIES} times; if memory ran out, lower --workers")


def _warn_of_waiting() -> None:
    if sys.stderr.isatty():
        sys.stderr.write(_SHOW_CURSOR)
    _log.warning("stopping when the running tasks are finished; press Ctrl-C again to stop at once")


def _start_process() -> ProcessPoolExecutor:
    # spawned: a forked worker would hold the pipes of its siblings, and not notice the end of its parent
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=end_with_parent)


def _block_signals() -> None:
    """Block signals in this thread, and so in the processes it starts, from their first instruction on.

    Ctrl-C at a terminal and SIGTERM from some batch systems reach all processes; only the parent acts on them.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


@contextmanager
def handling(
    handler: Callable[[int, FrameType | None], object] | signal.Handlers, *signals: signal.Signals
) -> Iterator[None]:
    """Set the handler of signals inside the block. Outside the main thread, where Python forbids it, do nothing."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in signals if main}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _exit_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def init_loader_worker(worker: int) -> None:
    """Make a loader process end with its parent, and ignore the signals that only the parent acts on.

    Batch systems signal all processes of a job; a loader that ended first would turn a stop into a failure.
    """
    end_with_parent()
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
