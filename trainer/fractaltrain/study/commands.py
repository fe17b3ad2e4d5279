"""Runs commands one after the other, and passes on to them the signals by which batch systems stop a study."""

import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from fractaltrain.preemption import EXIT_STOPPED, SIGNALS, stopped

_INTERRUPT_SECONDS = 5.0
RunCommand = Callable[[Sequence[str]], int]


@contextmanager
def passing_signals() -> Iterator[RunCommand]:
    """Inside the block, a function that runs a command and returns its exit code.

    SIGTERM and SIGUSR1 go to the command under way; one that comes between two of them holds for the next, which is
    not started then. Either way the function raises StoppedError. A terminal gives Ctrl-C to the command itself.
    """
    asked: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for child in children:
            child.send_signal(number)

    def run(command: Sequence[str]) -> int:
        if asked:
            raise stopped(asked[0])
        child = subprocess.Popen(command)
        children.append(child)
        if asked:  # while it was started
            child.send_signal(asked[0])
        try:
            code = _wait(child)
        finally:
            children.remove(child)
        if asked or code == EXIT_STOPPED or -code in SIGNALS:
            raise stopped(asked[0] if asked else signal.SIGTERM)
        if code == 128 + signal.SIGINT:
            raise KeyboardInterrupt
        return code

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield run
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(child: "subprocess.Popen[bytes]") -> int:
    """The exit code of a command; after Ctrl-C it has a few seconds to end by itself."""
    try:
        return child.wait()
    except KeyboardInterrupt:
        try:
            child.wait(_INTERRUPT_SECONDS)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGINT)
            child.wait()
        raise
