"""Executors that render the shards of a build: processes of this machine, or the workers of a Dask cluster."""

import logging
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager

from fractalshards.errors import FractalError, needs_extra
from fractalshards.workers import sigterm_interrupts, worker_pool

_CONNECT_SECONDS = 30


@contextmanager
def open_executor(workers: int, scheduler: str | None = None) -> Iterator[tuple[Executor, int]]:
    """Open an executor of local processes or of a Dask cluster; yield it and the number of tasks it runs at once.

    It runs a task again if its worker dies; ``workers.is_lost`` recognises the error of a task that it has given up.
    The workers of Dask need the same version of this software, and the folder of the dataset under the same path.
    Raises FractalError if Dask is not installed, no scheduler answers, or it has no workers.
    """
    if not scheduler:
        with worker_pool(workers) as pool:
            yield pool, workers
        return
    with needs_extra("dask", "a Dask cluster"):
        from distributed import Client
        from distributed.comm.addressing import get_address_host_port
    with ExitStack() as stack:
        for name in ("distributed", "distributed.client"):  # their logs are tracebacks of failures that raise anyway
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        try:
            get_address_host_port(scheduler)  # a client of a malformed address is never closed, and blocks the next one
            client = stack.enter_context(Client(scheduler, timeout=_CONNECT_SECONDS))
        except (OSError, TypeError, ValueError) as error:  # TypeError: TLS without certificates
            raise FractalError(f"{scheduler}: no Dask scheduler answers ({error}); check the address") from error
        stack.enter_context(sigterm_interrupts())
        threads = sum(client.nthreads().values())
        if not threads:
            raise FractalError(f"{scheduler}: the Dask cluster has no workers yet; start some, then run this again")
        yield client.get_executor(pure=False), threads
