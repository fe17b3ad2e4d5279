"""Fetches shards into a cache ahead of their use, in one process per machine that ends with the one that started it."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from fractalshards.errors import FractalError
from fractalshards.manifest import Manifest
from fractalshards.sharing.cache import ShardCache
from fractalshards.sharing.threads import Brake, run_threads
from fractalshards.workers import end_with_parent

_JOBS = 4
_AGAIN = 1  # whoever needs the shard is more patient, and says what is wrong


@contextmanager
def prefetching(cache: ShardCache) -> Iterator[Callable[[Sequence[str]], None]]:
    """Start the process; yields a function that says which shards are needed next, soonest first.

    As many of them are fetched as the cache holds together. What was said before is forgotten, but for the shards that
    are on their way. Failures are not told.
    """
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    arguments = (there, cache.url, cache.folder, cache.size, cache.manifest)
    process = context.Process(target=_follow, args=arguments, daemon=True)
    # the process inherits the mask: Ctrl-C is for this one
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    process.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    there.close()

    def want(names: Sequence[str]) -> None:
        with suppress(OSError):  # it was killed; whoever needs a shard fetches it
            here.send(list(names))

    try:
        yield want
    finally:
        process.kill()
        process.join()


def _follow(wishes: Connection, url: str, folder: Path, size: int, manifest: Manifest) -> None:
    end_with_parent()
    cache = ShardCache(url, folder, size, manifest, again=_AGAIN)
    while True:
        names = wishes.recv()
        while wishes.poll():
            names = wishes.recv()
        fetch_ahead(cache, names, wishes.poll)


def fetch_ahead(cache: ShardCache, names: Sequence[str], outdated: Callable[[], bool] = lambda: False) -> None:
    """Fetch shards in this order, as many as the cache holds together; those that are here already count as used.

    One that cannot be had is left to whoever needs it. Nothing more is begun when the wish is ``outdated``.
    """

    def fetch(name: str) -> None:
        if not outdated():
            with suppress(FractalError, OSError):
                cache.ensure(name)

    fitting = cache.fitting(names)
    for name in fitting:
        with suppress(OSError):
            cache.keep(name)
    run_threads([partial(fetch, name) for name in fitting], _JOBS, Brake())
