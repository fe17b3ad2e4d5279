"""What renders the shards of a build: an executor of ``concurrent.futures``, of local processes or of a Dask cluster.

Nothing else knows which one runs. ``open_engine`` is the one entry.
"""

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass

from fractalshards.errors import FractalError
from fractalshards.extras import needs_extra
from fractalshards.human import human_count
from fractalshards.workers import sigterm_interrupts, worker_pool

_SECONDS = 30  # to find a scheduler


@dataclass(frozen=True)
class Engine:
    """An executor, how many tasks it runs at once, and what to call it in a sentence.

    A task whose worker dies is tried on others by the executor itself; ``workers.is_lost`` tells when it gave up.
    """

    executor: Executor
    workers: int
    name: str


@contextmanager
def open_engine(workers: int, scheduler: str | None = None) -> Iterator[Engine]:
    """The engine of a build: ``workers`` local processes, or the Dask cluster of a scheduler.

    Args:
        scheduler: address of a Dask scheduler, ``tcp://HOST:PORT``; its workers need this software, and the folder of
            the dataset under the same path.

    Raises:
        FractalError: if Dask is not installed, no scheduler answers, or it has no workers.
    """
    if scheduler is None:
        with worker_pool(workers) as pool:
            yield Engine(pool, workers, human_count(workers, "worker"))
    else:
        with _open_dask(scheduler) as engine:
            yield engine


@contextmanager
def _open_dask(scheduler: str) -> Iterator[Engine]:
    with needs_extra("dask", "a Dask cluster"):
        from distributed import Client
    try:
        client = Client(scheduler, timeout=_SECONDS)
    except (OSError, ValueError) as error:
        raise FractalError(f"{scheduler}: no Dask scheduler answers ({error}); check the address") from error
    with client, sigterm_interrupts():
        threads = sum(client.nthreads().values())
        if not threads:
            raise FractalError(f"{scheduler}: the Dask cluster has no workers yet; start some, then run this again")
        executor = client.get_executor(pure=False)
        try:
            yield Engine(executor, threads, f"{human_count(threads, 'worker')} of {scheduler}")
        finally:
            executor.shutdown(wait=False)
