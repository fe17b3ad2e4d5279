"""Executors that render the shards of a build: processes of this machine, or the workers of a Dask cluster."""

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, InvalidStateError
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from fractalshards.errors import FractalError, needs_extra
from fractalshards.workers import sigterm_interrupts, worker_pool

if TYPE_CHECKING:
    from distributed import Client


_CONNECT_SECONDS = 30
_WATCH_SECONDS = 0.5
_LOST_SECONDS = 10.0
_RUNNING = "running"  # status of a connected client


@contextmanager
def open_executor(workers: int, scheduler: str | None = None) -> Iterator[tuple[Executor, int]]:
    """Open an executor of ``concurrent.futures``; yields it with the number of tasks that it runs at once.

    The executor runs a task again if its worker dies; ``workers.is_lost`` recognises the error of a task that it has
    given up.

    Args:
        workers: processes of this machine; not used with a scheduler.
        scheduler: address of a Dask scheduler, ``tcp://HOST:PORT``. Its workers need the same version of this software,
            and the folder of the dataset under the same path.

    Raises:
        FractalError: if Dask is not installed, no scheduler answers, or it has no workers.
    """
    if scheduler is None:
        with worker_pool(workers) as pool:
            yield pool, workers
        return
    with _connect(scheduler) as client, sigterm_interrupts():
        threads = sum(client.nthreads().values())
        if not threads:
            raise FractalError(f"{scheduler}: the Dask cluster has no workers yet; start some, then run this again")
        executor = _DaskExecutor(client, scheduler)
        try:
            yield executor, threads
        finally:
            executor.shutdown(wait=False)


@contextmanager
def _connect(scheduler: str) -> Iterator["Client"]:
    """Connect to a Dask scheduler, with Dask's logs silenced: they are tracebacks, and failures raise errors anyway."""
    with needs_extra("dask", "a Dask cluster"):
        from distributed import Client
        from distributed.comm.addressing import get_address_host_port
    with ExitStack() as stack:
        for name in ("distributed", "distributed.client"):  # those with levels of their own
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        try:
            get_address_host_port(scheduler)  # a client of a malformed address is never closed, and blocks the next one
            client = stack.enter_context(Client(scheduler, timeout=_CONNECT_SECONDS))
        except (OSError, TypeError, ValueError) as error:  # TypeError: TLS without certificates
            raise FractalError(f"{scheduler}: no Dask scheduler answers ({error}); check the address") from error
        yield client


class _DaskExecutor(Executor):
    """Dask's executor, but futures fail when the scheduler is lost; otherwise some would never finish."""

    def __init__(self, client: "Client", scheduler: str) -> None:
        self._client = client
        self._scheduler = scheduler
        self._executor = client.get_executor(pure=False)
        self._pending: set[Future[Any]] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def submit(self, task: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = self._executor.submit(task, *args, **named)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._closed.set()
        if self._client.status == _RUNNING:
            self._executor.shutdown(wait)

    def _watch(self) -> None:
        lost = 0.0
        while not self._closed.wait(_WATCH_SECONDS):
            lost = 0.0 if self._client.status == _RUNNING else lost + _WATCH_SECONDS
            if lost >= _LOST_SECONDS:  # a client that can reconnect has done so by now
                error = FractalError(f"{self._scheduler}: the scheduler is lost; start one, then run this again")
                for future in list(self._pending):
                    with suppress(InvalidStateError):
                        future.set_exception(error)
