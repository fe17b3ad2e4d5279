"""The first moments of a command, while Python imports: a signal ends it at once, in one line. It imports little."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from fractalshards.workers import handling

_CONTINUING = "run the same command to continue"
_ENDINGS = {  # as ``preemption`` and ``fractalshards.console`` have them
    signal.SIGINT: (f"stopped by Ctrl-C; {_CONTINUING}", 130),
    signal.SIGTERM: (f"stopped by SIGTERM; {_CONTINUING}", 75),
    signal.SIGUSR1: (f"stopped by SIGUSR1; {_CONTINUING}", 75),
}


@contextmanager
def ends_at_once() -> Iterator[None]:
    """Inside the block nothing has begun yet, and Ctrl-C, SIGTERM and SIGUSR1 end the process without a traceback.

    Not where torchrun started it, which ends its processes itself and tells why; and none that is ignored (``nohup``).
    """
    heard = () if "RANK" in os.environ else _ENDINGS
    numbers = [number for number in heard if signal.getsignal(number) != signal.SIG_IGN]
    with handling(_end, *numbers):
        yield


def _end(number: int, frame: FrameType | None) -> NoReturn:
    text, code = _ENDINGS[signal.Signals(number)]
    os.write(2, f"error: {text}\n".encode())
    os._exit(code)  # an exception would come out of the midst of somebody's import
