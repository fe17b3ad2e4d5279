"""A pool of worker processes that never outlive their parent and leave Ctrl-C to it."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from fractalshards.errors import FractalError

# Read by the workers when they start: they are as many as the cores already, and glibc shall keep memory for the next
# image instead of giving it back, for new pages cost as much as the rendering.
_ENVIRONMENT = {
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the most that older versions take
}


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """A process pool as ``concurrent.futures`` has it; what has not begun when the block ends is given up.

    SIGTERM, which batch systems send, ends the block as Ctrl-C does.

    Workers are spawned, not forked: only then does the end of the parent, even by SIGKILL, reach every one of them.

    Raises:
        FractalError: if a worker was killed.
    """
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise FractalError(
            "a worker process was killed, perhaps for lack of memory; what is finished is kept: "
            "lower --workers and run the same command again"
        ) from error
    finally:
        # a second Ctrl-C in the middle of shutting down would leave locks held, and the process would never end
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        pool.shutdown(cancel_futures=True)
        for name in added:
            os.environ.pop(name, None)
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, before)


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
