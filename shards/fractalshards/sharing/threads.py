"""Waiting work on several threads: as many at a time as asked for, ended by the first error or by Ctrl-C."""

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence

_GRACE_SECONDS = 3.0


class HaltedError(Exception):
    """Raised in a thread that shall end because another one failed, or the user wants it."""


class Brake:
    """Ends threads from outside: they call it often."""

    def __init__(self) -> None:
        self._pulled = threading.Event()

    def pull(self) -> None:
        """From now on ``check`` and ``wait`` raise."""
        self._pulled.set()

    def check(self) -> None:
        """Raise ``HaltedError`` if the brake was pulled."""
        if self._pulled.is_set():
            raise HaltedError

    def wait(self, seconds: float) -> None:
        """Sleep, but raise ``HaltedError`` as soon as the brake is pulled."""
        if self._pulled.wait(seconds):
            raise HaltedError


def run_threads(tasks: Sequence[Callable[[], None]], jobs: int, brake: Brake) -> None:
    """Run all tasks, ``jobs`` at a time; at the first error, or Ctrl-C, pull the brake and raise it.

    Threads get a moment to remove what they began. One that hangs in a dead connection is left behind: it does not
    keep the process from ending.
    """
    waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)

    def work() -> None:
        try:
            while True:
                brake.check()
                waiting.get_nowait()()
        except queue.Empty:
            ended.put(None)
        except BaseException as error:
            ended.put(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, len(tasks)))]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            if error := ended.get():
                raise error
    except BaseException:
        brake.pull()
        raise
    finally:
        _join(threads)


def _join(threads: Iterable[threading.Thread]) -> None:
    deadline = time.monotonic() + _GRACE_SECONDS
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))
