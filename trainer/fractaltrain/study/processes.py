"""Runs commands of ours in processes, and passes on to them the signals by which batch systems stop a study.

A command spends seconds on importing PyTorch and the like. Here a server imports it once, and every command is a fork.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import FrameType

from fractalshards.signals import handling
from fractalshards.workers import end_with_parent
from fractaltrain.preemption import EXIT_STOPPED, SIGNALS, stopped

_IMPORTED = (
    *("fractaltrain.launch", "fractaltrain.pretrain", "fractaltrain.finetune", "fractaltrain.history"),
    *("torch.utils.tensorboard", "matplotlib.figure", "sklearn.datasets"),
)
_HELD = (*SIGNALS, signal.SIGINT)
_THREADS = "OMP_NUM_THREADS"
_INTERRUPT_SECONDS = 5.0


class Processes:
    """Commands of ``fractaltrain`` that run beside each other, by name."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._processes: dict[str, ForkServerProcess] = {}
        self._asked = 0

    @property
    def running(self) -> int:
        """How many there are."""
        return len(self._processes)

    def start(self, name: str, arguments: Sequence[str], log: Path | None = None) -> None:
        """Start one; what it prints goes into ``log``, if that is given.

        Raises:
            StoppedError: instead, if a signal came, when all others have ended.
            OSError: if the log cannot be written.
        """
        if self._asked:
            self.wait()
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
        process = self._context.Process(target=_run, args=(tuple(arguments), log), name=name)
        process.start()
        self._processes[name] = process
        if self._asked:  # while it was started
            self.pass_on(self._asked)

    def wait(self) -> tuple[str, int]:
        """Name and exit code of one that has ended, when the first does.

        Raises:
            StoppedError: instead, if a signal came, when all have ended.
            KeyboardInterrupt: if one was interrupted.
        """
        while self._processes:
            connection.wait([process.sentinel for process in self._processes.values()])
            name = next(name for name, process in self._processes.items() if not process.is_alive())
            code = self._processes.pop(name).exitcode or 0
            if code == EXIT_STOPPED or -code in SIGNALS:
                self.pass_on(self._asked or signal.SIGTERM)
            if code in (-signal.SIGINT, 128 + signal.SIGINT):
                raise KeyboardInterrupt
            if not self._asked:
                return name, code
        raise stopped(self._asked)

    def pass_on(self, number: int, frame: FrameType | None = None) -> None:
        """Give a signal to all of them, those that are being started too; none starts after it."""
        self._asked = number
        for process in list(self._processes.values()):
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def end(self) -> None:
        """End what still runs, after an error: Ctrl-C at a terminal comes to all, so they have some time for it."""
        for process in self._processes.values():
            process.join(_INTERRUPT_SECONDS)
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGINT)
            process.join()


@contextmanager
def step_processes(threads: int | None = None) -> Iterator[Processes]:
    """Inside the block, SIGTERM and SIGUSR1 go to the processes, and no more are started.

    Args:
        threads: that each computes with, unless OMP_NUM_THREADS says so; None: as it chooses.

    Raises:
        StoppedError: if Ctrl-C ends the block, or one of the processes.
    """
    processes = Processes()
    _start_server(threads)
    with handling(processes.pass_on, *SIGNALS):
        try:
            yield processes
        except KeyboardInterrupt as error:
            raise stopped(signal.SIGINT) from error
        finally:
            processes.end()


def _start_server(threads: int | None) -> None:
    """Start what forks the processes. Signals that come to all processes of a job must not end it: it holds them."""
    multiprocessing.set_forkserver_preload(list(_IMPORTED))
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


def _run(arguments: tuple[str, ...], log: Path | None) -> None:
    """What each of the processes runs: the command line, as its own process would, but Ctrl-C ends it silently."""
    from fractaltrain.cli import main

    end_with_parent()
    if log:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, sys.__stdout__.fileno() if sys.__stdout__ else 1)
        os.close(file)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the study says it, once for all
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
    main(list(arguments), prog_name="fractaltrain")
