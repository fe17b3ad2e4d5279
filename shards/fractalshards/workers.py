"""Worker processes: a pool that survives killed workers and stops cleanly on signals, and the number of cores.

No process that a command starts looks for modules in the current folder: a dataset there may hold a ``signal.py``.
"""

import logging
import math
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import LifoQueue, SimpleQueue
from types import FrameType, ModuleType
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

from fractalshards.errors import FractalError, Terminated, WorkerLostError

TRIES = 3  # of a task whose worker is killed

OnProgress = Callable[[int, int], None]  # called with (done, total)

_SAFE_PATH = "PYTHONSAFEPATH"  # where it is set, Python leaves the current folder out of sys.path
# Workers read these when they start. There is a worker per core already, so BLAS gets one thread; and glibc keeps
# memory for the next image instead of returning it, because new pages cost as much as the rendering.
_ENVIRONMENT = {
    _SAFE_PATH: "1",
    "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",  # of multiprocessing, when the parent is killed
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the largest value that older versions accept
}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals by which batch systems ask a training to save and end."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")


def no_progress(done: int, total: int) -> None:
    """Ignore progress."""


def available_cores() -> int:
    """Return the number of cores that this process may use: by its affinity, and by the CPU quotas of its cgroups."""
    return min([len(os.sched_getaffinity(0)), *_cpu_quotas(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _cpu_quotas(membership: Path, mount: Path) -> Iterator[int]:
    """Yield the quotas, in cores and rounded up, of a process's cgroup and those above it, of version 1 or 2."""
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = mount / "cpu" if controllers else mount  # in a container this may be the group of the process itself
            for group in (Path(path), *Path(path).parents):
                folder = top / group.relative_to("/")
                for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
                    with suppress(OSError, ValueError):  # no such file; "max", which is no quota
                        quota, period = (int(word) for name in names for word in (folder / name).read_text().split())
                        if quota > 0:
                            yield math.ceil(quota / period)


def leave_out_current_folder() -> None:
    """Take the current folder off the module path of this process, and of all that it starts.

    Commands call it first. ``python -m`` puts the folder on the path before it runs any code of this project. Folders
    that PYTHONPATH or an installation names stay.
    """
    try:
        here = os.getcwd()
    except FileNotFoundError as error:
        raise FractalError("the current folder no longer exists; change to another one") from error
    if not os.environ.get(_SAFE_PATH) and not sys.flags.safe_path and sys.path[0] in ("", here):
        del sys.path[0]
    os.environ[_SAFE_PATH] = "1"


def _describe_exit(code: int) -> str:
    """Say how a process ended and what to do, as the end of a sentence that begins with it."""
    if code == -signal.SIGKILL:
        return "was killed by SIGKILL; if memory ran out, lower --workers"
    how = f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"{how}; its own messages, if any, are above"


def check_semaphores() -> None:
    """Raise FractalError if worker processes cannot have semaphores; Python's error would not name the folder."""
    try:
        multiprocessing.Lock()
    except OSError as error:
        advice = "worker processes need semaphores there: mount it writable, or free some space"
        raise FractalError(f"/dev/shm: {error.strerror}; {advice}") from error


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor]:
    """Yield an executor of up to ``workers`` spawned processes, started as tasks are submitted.

    Workers do not run the main module, so scripts need no main guard, and tasks must be functions of other modules. A
    task whose worker is killed runs again in a new one; after three such deaths its future raises ``WorkerLostError``.
    Other tasks are not affected.

    When the block ends, pending tasks are cancelled and running ones finish. SIGTERM ends the block as Ctrl-C does, by
    an exception; a second signal ends the process at once, and the workers with it.
    """
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    resource_tracker.ensure_running()  # started here: a pool thread that starts it would unblock its signals
    pool = _Pool(workers)
    try:
        with sigterm_interrupts():
            yield pool
        with uninterrupted():  # workers take a moment to end
            pool.shutdown(cancel_futures=True)
    except BaseException as error:
        with handling(signal.SIG_DFL, *_SIGNALS):
            if isinstance(error, KeyboardInterrupt):
                if sys.stderr.isatty():
                    sys.stderr.write("\x1b[?25h")  # shows the cursor, which progress bars hide
                _log.warning("stopping when the running tasks are finished; a second signal or Ctrl-C stops at once")
            pool.shutdown(cancel_futures=True)
        raise
    finally:
        for name in added:
            os.environ.pop(name, None)


def as_finished(futures: Collection[Future[_T]]) -> Iterator[Future[_T]]:
    """Yield futures as they finish, as ``as_completed`` does, but leave none of them locked after a signal."""
    count, finished = len(futures), SimpleQueue[Future[_T]]()  # a signal cannot interrupt it half-way
    with uninterrupted():
        for future in futures:
            future.add_done_callback(finished.put)
    for _ in range(count):
        yield finished.get()


def result_of(future: Future[_T]) -> _T:
    """Wait for the result of a future; see ``as_finished``."""
    return next(as_finished([future])).result()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM to the end of the block.

    Python raises their exceptions inside ``threading``, too, where a lock then stays locked, or a thread unknown to its
    pool; the end of the pool would wait forever.
    """
    arrived: list[int] = []
    try:
        with handling(lambda number, _: arrived.append(number), *_SIGNALS):
            yield
    finally:
        for number in arrived[:1]:
            signal.raise_signal(number)


def sigterm_interrupts() -> AbstractContextManager[None]:
    """Raise ``Terminated``, a KeyboardInterrupt, inside the block when SIGTERM arrives."""

    def terminate(*_: object) -> NoReturn:
        raise Terminated

    return handling(terminate, signal.SIGTERM)


def is_lost(error: BaseException) -> bool:
    """Return whether a task failed for lack of a worker or memory, so that others may succeed."""
    distributed = sys.modules.get("distributed")
    killed = (distributed.KilledWorker,) if distributed else ()
    return isinstance(error, (WorkerLostError, MemoryError, CancelledError, *killed))


def end_with_parent() -> None:
    """Make this child process exit when its parent does, however the parent ends."""

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            multiprocessing.connection.wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class _Pool(Executor):
    """Threads that each run one task at a time in a process of their own.

    A ``ProcessPoolExecutor`` fails all tasks when one worker is killed, and says neither which one it ran nor how it
    ended; where a limit keeps its own threads from starting, it waits forever.
    """

    def __init__(self, workers: int) -> None:
        # Ctrl-C at a terminal and SIGTERM from some batch systems reach all processes; only the parent acts on them.
        # Threads block them, and so do the processes that they start, from their first instruction on.
        blocked = signal.SIG_BLOCK, _SIGNALS
        self._threads = ThreadPoolExecutor(workers, initializer=signal.pthread_sigmask, initargs=blocked)
        self._workers: LifoQueue[_Worker | None] = LifoQueue()  # idle, or None if not started yet
        for _ in range(workers):
            self._workers.put(None)

    def submit(self, task: Callable[_P, _T], /, *args: _P.args, **named: _P.kwargs) -> Future[_T]:
        with uninterrupted():  # it starts threads
            return self._threads.submit(self._run, task, *args, **named)

    def map(self, fn: Callable[..., _T], *iterables: Iterable[Any], **_: Any) -> Iterator[_T]:
        return map(result_of, [self.submit(fn, *args) for args in zip(*iterables, strict=False)])

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._threads.shutdown(wait, cancel_futures=cancel_futures)
        while not self._workers.empty():
            if worker := self._workers.get():
                worker.stop()

    def _run(self, task: Callable[_P, _T], /, *args: _P.args, **named: _P.kwargs) -> _T:
        worker = self._workers.get()
        try:
            for _ in range(TRIES):
                worker = worker or _Worker()
                try:
                    worker.pipe.send((task, args, named))
                    result, error = worker.pipe.recv()
                except (EOFError, OSError):
                    died = _describe_exit(worker.stop())
                    worker = None
                    _log.warning("a worker process %s; its task runs again", died)
                    continue
                if error is not None:
                    raise error
                return cast(_T, result)
        finally:
            self._workers.put(worker)
        raise WorkerLostError(f"its worker process died {TRIES} times; the last one {died}")


class _Worker(SpawnProcess):
    """A process that runs one task at a time.

    It is spawned: a forked one would hold the pipes of its siblings, and not notice the end of its parent. It does not
    run the main module: a script without a main guard would start again.
    """

    _starting = threading.Lock()

    def __init__(self) -> None:
        pipe, other = multiprocessing.Pipe()
        super().__init__(target=_serve, args=(other,))
        with self._starting:
            main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
            try:
                self.start()
            finally:
                sys.modules["__main__"] = main
        other.close()  # so that the pipe ends with the process
        self.pipe = pipe  # only now: the process gets a copy of what is set before

    def stop(self) -> int:
        """Let the process end, and return its exit code."""
        self.pipe.close()
        self.join()
        return self.exitcode or 0


def _serve(pipe: "Connection[Any, Any]") -> None:
    """Run tasks until the pipe is closed: the main function of a worker."""
    try:
        end_with_parent()
    except RuntimeError as error:  # a limit of processes
        pipe.send((None, error))
        return
    with suppress(EOFError):
        while True:
            pipe.send(_run_task(pipe.recv_bytes()))


def _run_task(request: bytes) -> tuple[Any, BaseException | None]:
    try:
        task, args, named = pickle.loads(request)
        return task(*args, **named), None
    except BaseException as error:
        error.add_note(traceback.format_exc())  # for bugs: pickles have no traceback
        return None, error


@contextmanager
def handling(
    handler: Callable[[int, FrameType | None], object] | signal.Handlers, *signals: signal.Signals
) -> Iterator[None]:
    """Set the handler of signals inside the block; do nothing outside the main thread, where Python forbids it."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in signals if main}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)  # None: not a handler of Python


@contextmanager
def starting_loaders() -> Iterator[None]:
    """Make the loader processes that are forked inside the block ignore the signals that only the parent acts on.

    Terminals and batch systems signal all processes of a job, and a loader that ended first would make a stop look like
    a failure. In this process, Ctrl-C takes effect after the block, since Python loses one that comes while it forks,
    and the handler of SIGCHLD is restored: torch sets one that raises errors in any code that runs then.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *STOP_SIGNALS})  # the processes keep it
    try:
        with handling(signal.SIG_DFL, signal.SIGCHLD), uninterrupted():  # another thread may take the signal
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def watching(processes: Sequence[BaseProcess]) -> Iterator[None]:
    """Raise ``WorkerLostError`` inside the block when one of these child processes has died, or dies.

    Outside the main thread, this is noticed before the block only.
    """

    def check(*_: object) -> None:
        for process in processes:
            if code := process.exitcode:
                raise WorkerLostError(f"a loader worker {_describe_exit(code)}")

    with handling(check, signal.SIGCHLD):
        check()
        try:
            yield
        except Exception:
            check()  # torch catches the error of the handler
            raise
