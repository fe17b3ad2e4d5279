"""The processes that train together: who this one is, and what they say to each other."""

import gc
import logging
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.distributed.rendezvous import rendezvous

from fractalshards.console import as_quiet_as, is_quiet
from fractalshards.errors import FractalError, StoppedError, UsageError, describe_os_error
from fractalshards.workers import available_cores, end_with_parent
from fractaltrain.preemption import EXIT_STOPPED, SIGNALS, signals_raise, stopped

_ECHO = re.compile(r"gloo|nccl|c10d|connection|socket|TCPStore", re.IGNORECASE)
_ECHO_SECONDS = 15.0
_SILENT_SECONDS = 10.0
_AT_WORK_SECONDS = 10.0
_Any = TypeVar("_Any")


@dataclass(frozen=True)
class World:
    """This process among ``size`` equal ones, of which ``local_size`` are on this machine, this one ``local_rank``."""

    rank: int
    size: int
    local_size: int
    device: torch.device
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def nodes(self) -> int:
        """The number of machines, which have equally many processes. Collective.

        Raises:
            UsageError: if they have not.
        """
        sizes = {*self.gather(self.local_size)}
        if len(sizes) > 1 or self.size % self.local_size:
            raise UsageError("--nodes-split needs equally many processes on every machine; start it so, or drop it")
        return self.size // self.local_size

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of ``tensor`` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite ``tensor`` by that of rank 0."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def max(self, value: int) -> int:
        """The largest ``value`` of all processes; it waits for them, but not for their devices."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)  # on the CPU, so through gloo, which notices when another process is gone
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def share(self, value: _Any) -> _Any:
        """What rank 0 gives, on all processes. It is pickled, so of this software only."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: _Any) -> list[_Any]:
        """What each process gives, by rank, on all of them. It is pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_at_main(self, value: _Any) -> list[_Any]:
        """What each process gives, by rank, on rank 0; nothing on the others. It is pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.main else None
        dist.gather_object(value, values, dst=0)
        return values or []

    def barrier(self) -> None:
        """Wait for all processes."""
        self.max(0)

    def main_first(self) -> AbstractContextManager[None]:
        """Run the block on rank 0, then on all others: for what must happen once per shared file system."""
        return self._first(self.main)

    def local_main_first(self) -> AbstractContextManager[None]:
        """Run the block on one process of every machine, then on all others: for what a machine needs once."""
        return self._first(self.local_rank == 0)

    @contextmanager
    def _first(self, mine: bool) -> Iterator[None]:
        """Run the block where it is ``mine``, then on all others.

        It may take hours: who is at work says so every ten seconds, for no collective operation waits that long.
        """
        if self.size == 1:
            yield
            return
        if not mine:
            self._wait_for_workers()
            yield
            return
        done = threading.Event()

        def keep_waiting() -> None:
            with suppress(RuntimeError):  # another process is gone; the last operation fails as well, and is heard
                while not done.wait(_AT_WORK_SECONDS):
                    self.max(1)

        thread = threading.Thread(target=keep_waiting, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        self._wait_for_workers()

    def _wait_for_workers(self) -> None:
        while self.max(0):  # some are at work
            pass


@contextmanager
def join_world() -> Iterator[World]:
    """Take part in the group that torchrun's environment variables describe; alone without them.

    CUDA devices where there are any, with NCCL; otherwise CPUs, each process with its share of the cores, unless
    OMP_NUM_THREADS says how many threads it takes. What is said about the CPU's own tensors goes through gloo.

    Raises:
        FractalError: if there are fewer GPUs than processes, the processes do not find each other, memory runs out,
            batch norm sees a single value, or another process went away; a process that only notices the end of another
            one waits first, so that the one with the cause is heard.
    """
    world = _read_environment()
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    elif not os.environ.get("OMP_NUM_THREADS"):  # which torch has read
        torch.set_num_threads(max(available_cores() // world.local_size, 1))
    store = _meet(world) if world.size > 1 else None
    try:
        yield world
        world.barrier()
    except ValueError as error:
        if "Expected more than 1 value per channel" not in str(error):
            raise
        _stay_silent_unless_first(store, 1, wait=_SILENT_SECONDS)
        advice = "raise --batch-size or --image-size, or lower --accumulate or the number of processes"
        raise FractalError(
            f"batch norm needs more than the one value per channel that it sees here; {advice}"
        ) from error
    except RuntimeError as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, torch.OutOfMemoryError):
            advice = "lower --batch-size or --image-size, or raise --accumulate"
            raise FractalError(f"{world.device}: out of memory; {advice}") from error
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise FractalError(f"--compile failed: {first_line}; drop it") from error
        if "use_deterministic_algorithms" in str(error):
            raise FractalError(f"--deterministic: {first_line}; drop it, or choose another model") from error
        if world.size == 1 or not _ECHO.search(str(error)):
            raise
        threading.Thread(target=_hang_up, args=(error,), daemon=True).start()
        time.sleep(_ECHO_SECONDS)
        _stay_silent_unless_first(store, 1, wait=0)
        reason = first_line.split(". ")[0]
        raise FractalError(f"rank {world.rank} lost the other processes ({reason}); see their messages") from error
    except (OSError, FractalError) as error:
        told = error if isinstance(error, FractalError) else FractalError(describe_os_error(error))
        _stay_silent_unless_first(store, _exit_code(told), wait=_SILENT_SECONDS)
        raise told from error
    finally:
        _leave()


def _meet(world: World) -> Store:
    """Join the group of processes; the store is where they met.

    Raises:
        UsageError: if the port where they are to meet is no number.
        FractalError: if they do not find each other, or the port is in use.
    """
    port = os.environ.get("MASTER_PORT", "")
    if not port.isdecimal():
        raise UsageError(f"MASTER_PORT is {port!r}; set it to the number of a free port on the machine of rank 0")
    place = f"{os.environ.get('MASTER_ADDR')}:{port}"
    try:
        store: Store
        store, rank, size = next(iter(rendezvous("env://")))
        backend, device = ("cpu:gloo,cuda:nccl", world.device) if world.device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device)
        return store
    except (RuntimeError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        if "EADDRINUSE" in str(error):
            raise FractalError(f"{place}: the port is in use; choose another one (MASTER_PORT)") from error
        raise FractalError(f"rank {world.rank} did not find the others at {place}: {first_line}") from error


def _hang_up(error: BaseException) -> None:
    """Close the connections to the others, so that those who talk to this process alone notice, too.

    They close when nothing holds the group any more, neither the model nor a frame that the error came through.
    """
    traceback.clear_frames(error.__traceback__)
    _leave()


def _leave() -> None:
    """Leave the group and end its threads: they end with the last reference to it, which may be in a cycle.

    A thread of gloo that still holds a tensor of Python's when the interpreter ends would abort the process.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def _stay_silent_unless_first(store: Store | None, code: int, wait: float) -> None:
    """Let only one process tell the user what went wrong: the first of those that know.

    The others wait some seconds for their launcher, which ends them as soon as it notices the first one's end: if they
    were to end before that one, theirs would be the failure that it reports.
    """
    try:
        if store is None or store.add("fractaltrain failed", 1) == 1:
            return
    except RuntimeError:  # whoever held the store is gone
        return
    if code != EXIT_STOPPED:
        time.sleep(wait)
    raise SystemExit(code)


def _exit_code(error: FractalError) -> int:
    """As ``fractalshards.console.Commands`` chooses it."""
    if isinstance(error, StoppedError):
        return error.code
    return 2 if isinstance(error, UsageError) else 1


def count_gpus(processes: int) -> int:
    """The GPUs of this machine, each for one of its processes; 0 where all compute on CPUs.

    Raises:
        FractalError: if there are fewer GPUs than processes.
    """
    gpus = torch.cuda.device_count()  # asking the driver may take seconds
    if 0 < gpus < processes:
        raise FractalError(f"{processes} processes on a machine with {gpus} GPUs; lower --nproc to {gpus}")
    return gpus


def _read_environment() -> World:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = count_gpus(local_size)
    return World(
        rank=int(os.environ.get("RANK", 0)),
        size=int(os.environ.get("WORLD_SIZE", 1)),
        local_size=local_size,
        device=torch.device("cuda", local_rank) if gpus else torch.device("cpu"),
        local_rank=local_rank,
    )


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
