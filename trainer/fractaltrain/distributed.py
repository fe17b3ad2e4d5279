"""Training processes: starting them, stopping them, and collective communication.

``launch`` starts one process per GPU; torchrun has started them already. SIGTERM and SIGUSR1 set a flag; once any rank
has it, the training loop saves a checkpoint and the command exits with code 75. The launcher forwards both signals to
its ranks. Ctrl-C ends everything at once. A rank that dies takes the others down with it.
"""

import atexit
import errno
import json
import logging
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from fractalshards.errors import FractalError, StoppedError, UsageError, describe_os_error
from fractalshards.human import one_line
from fractalshards.storage import write_json
from fractalshards.workers import STOP_SIGNALS, available_cores, end_with_parent, handling
from fractaltrain.config import EXIT_STOPPED

_GRACE_SECONDS = 12.0  # after a rank fails, the others have this long to end, and again after SIGTERM
_MOST_LOADERS = 8  # loader workers per rank, unless --workers asks for more
_PATIENCE = timedelta(days=1)  # timeout while one rank prepares something for the others
_WARNING_SECONDS = 10.0  # time to wait for other processes before a warning

_log = logging.getLogger(__name__)

_Config = TypeVar("_Config")
_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """The process group as one rank sees it."""

    rank: int  # number of this process, from 0
    size: int  # number of processes
    local_rank: int  # number of this process on its machine
    local_size: int  # number of processes on this machine
    device: torch.device  # where this process computes
    _patient_group: Any = None

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    def nodes(self) -> int:
        """Number of machines; raises UsageError if they run different numbers of processes. Collective."""
        sizes = {*self.gather(self.local_size)}
        if len(sizes) > 1 or self.size % self.local_size:
            raise UsageError("--nodes-split needs the same number of processes on every machine")
        return self.size // self.local_size

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum ``tensor`` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite ``tensor`` with that of rank 0."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def max(self, value: int) -> int:
        """Return the largest ``value`` of all ranks. Does not wait for the devices."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)  # a CPU tensor goes through gloo, which notices a lost rank
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def share(self, value: _T) -> _T:
        """Return the value of rank 0 on all ranks (pickled)."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: _T) -> list[_T]:
        """Return the values of all ranks, by rank, on all of them (pickled)."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def loader_workers(self, wanted: int | None) -> int:
        """Return ``wanted``, or by default one loader process per idle core of this rank: 0 on CPUs."""
        if wanted is not None:
            return wanted
        if self.device.type == "cpu":
            return 0
        return max(min(available_cores() // self.local_size - 1, _MOST_LOADERS), 1)

    def barrier(self) -> None:
        """Wait for all ranks, for up to a day. Does not wait for the devices."""
        if self.size > 1:
            dist.barrier(group=self._patient_group)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0, then on the others: for work that a shared file system needs once."""
        if self.main:
            yield
        self.barrier()
        if not self.main:
            yield

    def from_main(self, compute: Callable[[], _T]) -> _T:
        """Compute a value on rank 0, which may take long, and return it on all ranks (pickled). Collective."""
        value = compute() if self.main else None
        self.barrier()
        return self.share(cast(_T, value))


@contextmanager
def join_world() -> Iterator[World]:
    """Join the process group that ``launch`` or torchrun describes in environment variables; else be its only rank.

    Uses NCCL on GPUs, and gloo for tensors on CPUs. A process on a CPU uses its share of the cores, unless
    OMP_NUM_THREADS is set. After an error the process must end. Raises UsageError if the environment variables are
    invalid; FractalError if there are fewer GPUs than processes, or the device runs out of memory.
    """
    rank, size, local_rank, local_size = _read_place()
    device = torch.device("cuda", local_rank) if count_gpus(local_size) else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(available_cores() // local_size, 1))
    patient_group = _connect(rank, size, device) if size > 1 else None
    try:
        yield World(rank, size, local_rank, local_size, device, patient_group)
    except torch.OutOfMemoryError as error:
        raise FractalError(
            f"{device}: out of memory; lower --batch-size or --image-size, or raise --accumulate"
        ) from error
    if dist.is_initialized():  # not after an error: NCCL would wait for ranks that wait for this one
        dist.destroy_process_group()


def _read_place() -> tuple[int, int, int, int]:
    """Return rank, size, local rank and local size from the environment."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    found = {name: os.environ.get(name, default) for name, default in defaults.items()}
    if not all(map(str.isdecimal, found.values())) or int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        shown = ", ".join(f"{name}={value}" for name, value in found.items() if name in os.environ)
        raise UsageError(f"{shown} in the environment: set them as torchrun does, with ranks from 0, or unset them")
    rank, size, local_rank, local_size = map(int, found.values())
    return rank, size, local_rank, local_size


def _connect(rank: int, size: int, device: torch.device) -> Any:
    """Create the process group, and return another one whose barrier waits for a day.

    Warns if other processes take long to join; raises FractalError if they do not join in time.
    """
    where = f" at {os.environ.get('MASTER_ADDR')}:{os.environ['MASTER_PORT']}" if "MASTER_PORT" in os.environ else ""
    text = "rank %d of %d is waiting for the others%s; check that all have started and can reach each other"
    warning = threading.Timer(_WARNING_SECONDS, _log.warning, (text, rank, size, where))
    warning.daemon = True
    warning.start()
    backend, device_id = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    try:
        dist.init_process_group(
            backend, init_method=os.environ.get(_STORE), rank=rank, world_size=size, device_id=device_id
        )
        return dist.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = one_line(str(error).partition("\n")[0]).rstrip(".")
        raise FractalError(
            f"rank {rank} of {size} could not reach the other processes{where} ({reason}); check MASTER_ADDR and "
            "MASTER_PORT, and that all have started"
        ) from error
    finally:
        warning.cancel()
        warning.join()  # loader workers are forks of this process, and must not inherit it


def count_gpus(processes: int) -> int:
    """Return the number of GPUs of this machine, or 0 if it has none.

    Raises FractalError if there are fewer GPUs than ``processes``.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise FractalError(f"{processes} processes on a machine with {gpus} GPUs; lower --nproc to {gpus}")
    return gpus


@dataclass
class StopFlag:
    """The signals that this process received."""

    signal: int = 0  # the last one that asks to save and stop; 0: none. The ranks agree to stop, see ``World.max``
    interrupted: bool = False  # by Ctrl-C

    def check_interrupt(self) -> None:
        """Raise KeyboardInterrupt after Ctrl-C, if a library swallowed the one that the signal raised."""
        if self.interrupted:
            raise KeyboardInterrupt


def stopped_by(number: int) -> StoppedError:
    """Return the error that ends a run after a signal, once it has saved a checkpoint."""
    return StoppedError(f"stopped by {signal.Signals(number).name}; run the same command to continue", EXIT_STOPPED)


@contextmanager
def stop_on_signal() -> Iterator[StopFlag]:
    """Make SIGTERM and SIGUSR1 only set a flag inside the block; where Ctrl-C raises KeyboardInterrupt, record it."""
    flag = StopFlag()

    def remember(number: int, frame: FrameType | None) -> None:
        flag.signal = number

    def interrupt(number: int, frame: FrameType | None) -> None:
        flag.interrupted = True
        raise KeyboardInterrupt

    raising = [signal.SIGINT] if signal.getsignal(signal.SIGINT) is signal.default_int_handler else []
    with handling(remember, *STOP_SIGNALS), handling(interrupt, *raising):
        yield flag


def launch(entry: Callable[[_Config], None], config: _Config, nproc: int | None) -> None:
    """Run ``entry(config)`` in ``nproc`` processes on this machine, or in this process if torchrun started it.

    Once all have ended, raises the error of the rank that failed first.

    Args:
        entry: an importable function.
        config: picklable.
        nproc: None: one process per GPU, or one on a machine without GPUs. A single one runs in this process.
    """
    if "RANK" in os.environ:
        record(entry)(config)
        return
    gpus = count_gpus(nproc or 1)
    nproc = nproc or max(gpus, 1)
    try:
        if nproc == 1:
            entry(config)
        else:
            _launch_ranks(entry, config, nproc)
    except KeyboardInterrupt as error:
        raise StoppedError("stopped by Ctrl-C; run the same command to continue", 128 + signal.SIGINT) from error


_STORE = "FRACTALTRAIN_STORE"  # environment variable: URL of the store in which the ranks of one launch meet


def _launch_ranks(entry: Callable[[_Config], None], config: _Config, nproc: int) -> None:
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for pid in ranks.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    with tempfile.TemporaryDirectory(prefix="fractaltrain-") as name:
        folder = Path(name)
        # Ctrl-C reaches the ranks, too; they ignore it until they run, or each would print a traceback of imports.
        on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            ranks = start_processes(_run_rank, (entry, config, nproc, folder), nproc, join=False)
        finally:
            signal.signal(signal.SIGINT, on_interrupt)
        try:
            with handling(forward, *STOP_SIGNALS):
                while True:
                    multiprocessing.connection.wait(ranks.sentinels)
                    killed = _killed(ranks.processes)
                    if ranks.join(grace_period=_GRACE_SECONDS):
                        break
        except (ProcessExitedException, ProcessRaisedException) as error:
            if reason := _first_error(folder):
                raise reason from error
            if isinstance(error, ProcessRaisedException) and not killed:  # a bug; the message contains the traceback
                raise
            if received:  # before the training loop, where there was nothing to save
                raise StoppedError(f"stopped by {signal.Signals(received[0]).name}", 128 + received[0]) from error
            advice = "run the same command to continue; if memory ran out, lower --batch-size or --workers"
            raise FractalError(f"{killed or error}; {advice}") from error
        except KeyboardInterrupt:
            for process in ranks.processes:
                process.kill()
            raise
        finally:
            for path in ranks.error_files:  # torch removes none of them
                Path(path).unlink(missing_ok=True)


def _killed(ranks: Sequence[BaseProcess]) -> str:
    """Name the first rank that a signal has killed; empty if there is none.

    Ranks that wait for it fail as well, and may end before the launcher looks: torch would name one of them.
    """
    for rank, process in enumerate(ranks):
        if (code := process.exitcode or 0) < 0:
            return f"process {rank} terminated with signal {signal.Signals(-code).name}"
    return ""


def _run_rank(rank: int, entry: Callable[[_Config], None], config: _Config, size: int, folder: Path) -> None:
    """Run ``entry`` as one of ``size`` ranks on this machine; write its error into ``folder``."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback; torch sends SIGINT when the launcher dies
    end_with_parent()  # it may have died before torch asked for that
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    store = f"file://{folder}/store"  # torch takes the path as it is, with nothing escaped
    os.environ.update({name: str(value) for name, value in names.items()}, **{_STORE: store})
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name may not resolve
    try:
        entry(config)
    except Exception as error:
        code = error.code if isinstance(error, StoppedError) else 2 if isinstance(error, UsageError) else 1
        atexit.register(os._exit, code)  # gloo may abort a connected process while Python shuts down
        if not isinstance(error, FractalError | OSError):
            raise
        message = describe_os_error(error) if isinstance(error, OSError) else str(error)
        pipe = isinstance(error, BrokenPipeError)
        write_json(folder / f"error-{rank}.json", {"code": code, "message": message, "pipe": pipe})
        sys.exit(code)


def _first_error(folder: Path) -> Exception | None:
    """Return the first error that a rank wrote, if any; an error counts before a stop by a signal."""
    paths = sorted(folder.glob("error-*.json"), key=lambda path: path.stat().st_mtime_ns)
    found = sorted((json.loads(path.read_text()) for path in paths), key=lambda error: error["code"] == EXIT_STOPPED)
    if not found:
        return None
    code, message = found[0]["code"], found[0]["message"]
    if found[0]["pipe"]:
        return BrokenPipeError(errno.EPIPE, message)  # nobody reads the output, as with ``| head``
    if code == EXIT_STOPPED:
        return StoppedError(message, code)
    return UsageError(message) if code == 2 else FractalError(message)
