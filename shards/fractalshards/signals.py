"""Handlers of signals for a while. It imports little, for commands have some from their first moment on."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


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
