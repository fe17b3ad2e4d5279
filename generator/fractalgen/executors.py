"""What renders the shards of a build: an executor of ``concurrent.futures``, of local processes or of a Dask cluster.

Nothing else knows which one runs. ``open_engine`` is the one entry.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fractalshards.errors import FractalError, needs_extra
from fractalshards.workers import sigterm_interrupts, worker_pool

if TYPE_CHECKING:
    from distributed import Client


_SECONDS = 30  # to find a scheduler
_WATCH_SECONDS = 0.5
_LOST_SECONDS = 10.0
_RUNNING = "running"  # status of a client


@dataclass(frozen=True)
class Engine:
    """An executor, how many tasks it runs at once, and what follows "4 workers" to say whose they are, perhaps nothing.

    A task whose worker dies is tried on others by the executor itself; ``workers.is_lost`` tells when it gave up.
    """

    executor: Executor
    workers: int
    where: str


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
            yield Engine(pool, workers, "")
    else:
        with _open_dask(scheduler) as engine:
            yield engine


@contextmanager
def _open_dask(scheduler: str) -> Iterator[Engine]:
    with needs_extra("dask", "a Dask cluster"):
        from distributed import Client
        from distributed.comm.addressing import get_address_host_port
    try:
        get_address_host_port(scheduler)  # first: a client of a bad address is never closed, and stalls the next one
        client = Client(scheduler, timeout=_SECONDS)
    except (OSError, TypeError, ValueError) as error:  # TypeError: TLS without certificates
        raise FractalError(f"{scheduler}: no Dask scheduler answers ({error}); check the address") from error
    with _quiet(), client, sigterm_interrupts():
        threads = sum(client.nthreads().values())
        if not threads:
            raise FractalError(f"{scheduler}: the Dask cluster has no workers yet; start some, then run this again")
        executor = _Watched(client, scheduler)
        try:
            yield Engine(executor, threads, f" of {scheduler}")
        finally:
            executor.shutdown(wait=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Dask's log, which has tracebacks for whatever is lost; what matters becomes an error of one line."""
    logger = logging.getLogger("distributed")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Watched(Executor):
    """Dask's executor, whose futures fail when the scheduler is lost: by themselves, some would never be done."""

    def __init__(self, client: "Client", scheduler: str) -> None:
        self._client = client
        self._scheduler = scheduler
        self._executor = client.get_executor(pure=False)
        self._pending: set[Future[Any]] = set()
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def submit(self, task: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = self._executor.submit(task, *args, **named)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._over.set()
        if self._client.status == _RUNNING:
            self._executor.shutdown(wait)

    def _watch(self) -> None:
        lost = 0.0
        while not self._over.wait(_WATCH_SECONDS):
            lost = 0.0 if self._client.status == _RUNNING else lost + _WATCH_SECONDS
            if lost >= _LOST_SECONDS:  # it would have connected again by now
                error = FractalError(f"{self._scheduler}: the scheduler is lost; start one, then run this again")
                for future in list(self._pending):
                    with suppress(InvalidStateError):
                        future.set_exception(error)
