"""The processes that train together: who this one is, and what they say to each other."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fractalshards.console import describe_os_error
from fractalshards.errors import FractalError
from fractalshards.workers import available_cores

_ECHO = re.compile(r"gloo|nccl|c10d|connection|socket|TCPStore", re.IGNORECASE)
_ECHO_SECONDS = 20.0


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

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of ``tensor`` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrite ``tensor`` by that of rank 0."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Run the block on rank 0, then on all others: for what must happen once per shared file system."""
        if not self.main:
            self.barrier()
        yield
        if self.main:
            self.barrier()


@contextmanager
def join_world() -> Iterator[World]:
    """Take part in the group that torchrun's environment variables describe; alone without them.

    CUDA devices where there are any, with NCCL; otherwise CPUs with gloo, each process with its share of the cores.

    Raises:
        FractalError: if there are fewer GPUs than processes, memory runs out, or another process went away; a process
            that only notices the end of another one waits first, so that the one with the cause is heard.
    """
    world = _read_environment()
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    else:
        torch.set_num_threads(max(available_cores() // world.local_size, 1))
    try:
        if world.size > 1:
            if world.device.type == "cuda":
                dist.init_process_group("nccl", device_id=world.device)
            else:
                dist.init_process_group("gloo")
        yield world
        world.barrier()
    except torch.OutOfMemoryError as error:
        raise FractalError(f"{world.device}: out of memory; lower --batch-size or --image-size") from error
    except OSError as error:
        raise FractalError(describe_os_error(error)) from error
    except RuntimeError as error:
        if world.size == 1 or not _ECHO.search(str(error)):
            raise
        time.sleep(_ECHO_SECONDS)
        first_line = str(error).splitlines()[0]
        raise FractalError(f"rank {world.rank} lost the other processes ({first_line}); see their messages") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _read_environment() -> World:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    gpus = torch.cuda.device_count()
    if 0 < gpus < local_size:
        raise FractalError(f"{local_size} processes on a machine with {gpus} GPUs; lower --nproc to {gpus}")
    return World(
        rank=int(os.environ.get("RANK", 0)),
        size=int(os.environ.get("WORLD_SIZE", 1)),
        local_size=local_size,
        device=torch.device("cuda", local_rank) if gpus else torch.device("cpu"),
        local_rank=local_rank,
    )
