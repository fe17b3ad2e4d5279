"""Starts one training process per GPU, or as many as asked for, on this machine."""

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from types import FrameType
from typing import NoReturn, TypeVar, cast

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fractalshards.console import as_quiet_as, is_quiet
from fractalshards.errors import FractalError, StoppedError, UsageError
from fractalshards.workers import end_with_parent
from fractaltrain.preemption import EXIT_STOPPED, SIGNALS, signals_raise, stopped
from fractaltrain.world import count_gpus

_Choice = TypeVar("_Choice")


def launch(entry: Callable[[_Choice], None], choice: _Choice, nproc: int | None) -> None:
    """Run ``entry(choice)`` in every process of a new world, or in this one if torchrun started it.

    Without ``nproc`` there is a process per GPU, or one on a machine without. ``entry`` must be importable and
    ``choice`` picklable.

    Raises:
        FractalError: if there are fewer GPUs than processes; of the process that failed first, by then all are down.
        StoppedError: if a signal came, before the training loop began, too.
    """
    if "RANK" in os.environ:  # whoever started this one tells why it ends it
        entry(choice)
        return
    with signals_raise():
        gpus = count_gpus(nproc or 1)
        nproc = nproc or max(gpus, 1)
        if nproc == 1:
            entry(choice)
        else:
            _launch_all(entry, choice, nproc)


def _launch_all(entry: Callable[[_Choice], None], choice: _Choice, nproc: int) -> None:
    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        """Give SIGUSR1 to the training processes, which save and end; torch's launcher passes on SIGTERM itself."""
        children = multiprocessing.active_children()
        if not children:
            before(number, frame)
        asked.append(number)
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(cast(int, child.pid), number)

    before = cast(Callable[[int, FrameType | None], NoReturn], signal.signal(signal.SIGUSR1, pass_on))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would look up the host's name, which may not resolve
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")  # of processes that were stopped
    logging.disable(logging.ERROR)  # the launcher reports each failure, with tracebacks; we say it in one line
    try:
        with tempfile.TemporaryDirectory() as log_dir, _interrupts_held_from_children():
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=nproc,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                local_addr="localhost",
                max_restarts=0,
                logs_specs=DefaultLogsSpecs(log_dir=log_dir),
            )
            elastic_launch(config, _take_part)(entry, choice, is_quiet())
    except ChildFailedError as error:
        raise _explain_all(error, asked[0] if asked else signal.SIGTERM) from error
    except SignalException as error:
        raise stopped(error.sigval) from error
    finally:
        logging.disable(logging.NOTSET)


def _take_part(entry: Callable[[_Choice], None], choice: _Choice, quiet: bool) -> None:
    """What each of the processes runs. It ends when the launcher is killed, and from here on by Ctrl-C, silently."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    with as_quiet_as(quiet):
        entry(choice)


@contextmanager
def _interrupts_held_from_children() -> Iterator[None]:
    """Block Ctrl-C in processes started inside the block: each would show a traceback of what it was importing.

    They inherit the mask of this thread; another one takes the signal instead, and Python then acts here.
    """
    resource_tracker.ensure_running()  # else the first child would start it, which unblocks the signal
    ended = threading.Event()
    taker = threading.Thread(target=ended.wait, daemon=True)
    taker.start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ended.set()
        taker.join()


def _explain_all(error: ChildFailedError, asked: int) -> FractalError:
    """The error of the process that failed first; of processes that stopped, of one that says why, else ``asked``."""
    rank, first = error.get_first_failure()
    if first.exitcode != EXIT_STOPPED:
        return _explain(rank, first)
    told = (_explain(rank, failure) for rank, failure in error.failures.items() if isinstance(failure.message, dict))
    return next(told, stopped(asked))


def _explain(rank: int, failure: ProcessFailure) -> FractalError:
    """The error of a process as this one's own. What is no FractalError is a bug of ours: show where."""
    message = failure.message
    if -failure.exitcode in (*SIGNALS, signal.SIGINT):
        return stopped(-failure.exitcode)
    if not isinstance(message, dict):
        return FractalError(f"rank {rank} was killed ({message}); if memory ran out, lower --batch-size or --workers")
    kind, _, text = message["message"].partition(": ")
    if kind == "StoppedError":
        return StoppedError(text, EXIT_STOPPED)
    if kind == "UsageError":
        return UsageError(text)
    if kind in _names(FractalError):
        return FractalError(text)
    sys.stderr.write(message["extraInfo"]["py_callstack"])
    return FractalError(f"rank {rank} failed: {message['message']}; please report this")


def _names(kind: type[FractalError]) -> set[str]:
    """The names of a class and of all that derive from it."""
    return {kind.__name__}.union(*map(_names, kind.__subclasses__()))
