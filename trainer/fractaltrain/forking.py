"""A server imports PyTorch once, which takes seconds, and forks the processes that need it: steps, ranks."""

import multiprocessing
import os
import signal
from multiprocessing import forkserver, resource_tracker
from typing import Final

from fractalshards.workers import end_with_parent
from fractaltrain.preemption import SIGNALS

METHOD: Final = "forkserver"  # as multiprocessing calls it

_IMPORTED = (
    *("fractaltrain.launch", "fractaltrain.pretrain", "fractaltrain.finetune", "fractaltrain.history"),
    *("torch.utils.tensorboard", "matplotlib.figure", "sklearn.datasets"),
)
_HELD = (*SIGNALS, signal.SIGINT)
_THREADS = "OMP_NUM_THREADS"


def start_server(threads: int | None = None) -> None:
    """Start the server, unless it runs; it imports while this process goes on.

    Signals that come to all processes of a job or a terminal must not end it: it holds them, and so do the processes
    that it forks, until they ``join_in``.

    Args:
        threads: that each process computes with, unless OMP_NUM_THREADS says so; None: as it chooses.
    """
    multiprocessing.set_forkserver_preload(list(_IMPORTED))
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")  # of processes that were stopped
    resource_tracker.ensure_running()  # else the server would start it, which unblocks the signals
    chosen = threads is not None and _THREADS not in os.environ
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        if chosen:
            os.environ[_THREADS] = str(threads)
        forkserver.ensure_running()
    finally:
        if chosen:
            del os.environ[_THREADS]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def join_in() -> None:
    """What a process does that was forked: from now on signals come to it, and it ends when its parent does."""
    end_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
