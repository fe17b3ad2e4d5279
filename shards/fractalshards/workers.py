"""A pool of worker processes that never outlive their parent and leave Ctrl-C to it."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """A process pool as ``concurrent.futures`` has it.

    Workers are spawned, not forked: only then does the end of the parent, even by SIGKILL, reach every one of them.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker)


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
