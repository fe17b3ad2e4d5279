"""Batch systems take machines back: SIGTERM and SIGUSR1 ask a run to save and end, and it does so between two steps."""

import math
import os
import select
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TypeVar

from fractalshards.errors import StoppedError, Terminated
from fractalshards.workers import end_with_parent, handling

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and saved (EX_TEMPFAIL: the same command continues)."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_GRACE = 25.0  # seconds
_DONE = 0  # no signal's number

_Item = TypeVar("_Item")


class Stop:
    """Whether this process was asked to stop. Only all ranks together decide that they do.

    Attributes:
        number: of the signal that came; 0 before.
    """

    def __init__(self) -> None:
        self.number = 0

    def until_requested(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The items up to the signal; all of them without one."""
        for item in items:
            if self.number:
                return
            yield item


def stopped(number: int) -> StoppedError:
    """The end of a run that a signal stopped; its exit code says whether the run could save before."""
    by = f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name}"
    if number in SIGNALS:
        return StoppedError(f"{by}; run the same command to continue", EXIT_STOPPED)
    advice = "the same command continues from the last checkpoint, if there is one"
    return StoppedError(f"{by}, which saves nothing; {advice}", 128 + number)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Where there is nothing to save, SIGTERM, SIGUSR1 and Ctrl-C end the block by a ``StoppedError``.

    Inside it is a KeyboardInterrupt, which nothing takes for the error of a damaged file. Python drops it where it is
    raised inside a finalizer; then ``stop_signals`` ends the block.
    """
    raiser = _Raiser()
    try:
        with handling(raiser, *SIGNALS):
            yield
    except Terminated as error:  # by who minds SIGTERM as Ctrl-C, pools of workers for one
        raise stopped(signal.SIGTERM) from error
    except KeyboardInterrupt as error:
        raise stopped(raiser.came or signal.SIGINT) from error


class _Raiser:
    """A handler that raises, and remembers which signal ``came`` first; 0: none."""

    def __init__(self) -> None:
        self.came = 0

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        self.came = self.came or number
        raise KeyboardInterrupt


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Inside the block SIGTERM and SIGUSR1 only set a mark, for the loop to find.

    Launchers send SIGTERM for another reason, too: because a process beside this one failed. Then there is nothing to
    save: this one may be blocked inside a collective operation, where no Python runs, or fail for the lack of the
    other. So SIGTERM ends it after 25 s at the latest, and at once if such an operation fails after it came.

    Raises:
        StoppedError: if a signal came before the block, inside ``signals_raise``, and what that raised was dropped.
    """
    stop = Stop()

    def mark(number: int, frame: FrameType | None) -> None:
        stop.number = number

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(SIGNALS[0])
    try:
        with handling(mark, *SIGNALS):
            if isinstance(before, _Raiser) and before.came:
                raise stopped(before.came)
            with _ended_in_time():
                yield stop
    except RuntimeError:  # as collective operations raise when another process is gone
        if stop.number == signal.SIGTERM:  # asked only here, where none that comes is marked any more
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)
        raise


def prepare_worker(worker: int) -> None:
    """For loader workers: batch systems signal all processes at once, but workers end when their parent does.

    However often they signal: a worker that is missing would make a failure of a stop. By itself torch's worker may
    wait for ever after a SIGKILL of its parent, to hand over a batch.
    """
    end_with_parent()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _ended_in_time() -> Iterator[None]:
    """End the process 25 s after a SIGTERM, unless the block is done by then.

    The interpreter writes the number of each signal into a pipe as soon as it comes, even while the main thread is
    blocked; a second thread reads it there.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        deadline = math.inf
        while (number := next_signal(deadline)) != _DONE:
            if number is None:
                os._exit(128 + signal.SIGTERM)
            if number == signal.SIGTERM:
                deadline = min(deadline, time.monotonic() + _GRACE)

    def next_signal(deadline: float) -> int | None:
        left = None if deadline == math.inf else max(deadline - time.monotonic(), 0)
        return os.read(reader, 1)[0] if select.select([reader], [], [], left)[0] else None

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(writer, bytes([_DONE]))
        thread.join()
        os.close(reader)
        os.close(writer)
