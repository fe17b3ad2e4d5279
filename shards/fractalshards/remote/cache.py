"""A bounded local folder of the shards of a remote dataset, shared by all processes of a machine.

    FOLDER/train-000000.json   sidecars, all of them
    FOLDER/train-000007.tar    the shards used last, whole and checked
    FOLDER/locks/              one lock per shard, held while it is fetched

A process that needs a shard fetches it while others wait for its lock. The least recently used shards make room; a
shard that is removed stays readable where it is open. Temporary files have the size of their shard before its bytes
arrive, so they count, and those of killed processes are removed.
"""

import functools
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, cast

from filelock import FileLock

from fractalshards.errors import FractalError, UsageError
from fractalshards.human import human_bytes
from fractalshards.manifest import Manifest, Shard
from fractalshards.remote.stores import FileInfo, LocalStore, Store, open_store, parse_location
from fractalshards.remote.transfer import find_sidecar, read_manifest, read_sidecar, run_tasks, select_shards
from fractalshards.storage import TEMPORARY, atomic_file, check_space, private_cache, remove_leftovers
from fractalshards.workers import OnProgress, no_progress

_JOBS = 8
_PREFETCH_JOBS = 4
_POLL_SECONDS = 0.1


class ShardCache:
    """The shards of a dataset, of which at most ``size`` bytes are cached at a time; it can be forked and pickled."""

    def __init__(self, url: str, folder: Path, size: int, manifest: Manifest) -> None:
        self.url = url
        self.folder = folder
        self.size = size
        self.manifest = replace(manifest, folder=folder)
        self._shards = {shard.name: shard for shard in select_shards(manifest, None, parse_location(url).shown)}

    def check_window(self, window: int, split: str) -> None:
        """Raise UsageError if the cache cannot hold ``window`` shards of a split together."""
        sizes = {name: [shard.bytes for shard in shards] for name, shards in self.manifest.splits.items()}
        least = max(sum(sorted(sizes.get(split, []))[-window:]), *(max(part, default=0) for part in sizes.values()))
        if self.size < least:
            raise UsageError(
                f"a cache of {human_bytes(self.size)} does not hold the {window} shards that are shuffled together "
                f"({human_bytes(least)}); raise --cache-size or lower --window"
            )

    def prepare(self, on_progress: OnProgress = no_progress) -> None:
        """Check the disk, fetch missing sidecars, and remove damaged shards; ``on_progress`` counts shards."""
        (self.folder / "locks").mkdir(parents=True, exist_ok=True)
        folder = LocalStore(self.folder)

        def prepare(shard: Shard) -> None:
            if find_sidecar(folder, self.manifest, shard) is None:
                folder.put([read_sidecar(store, self.manifest, shard)])
            if not folder.holds(shard.name, FileInfo(shard.bytes, shard.sha256)):
                (self.folder / shard.name).unlink(missing_ok=True)  # damaged

        with self._lock("prepare"):
            remove_leftovers(self.folder)
            wanted = min(self.size, self.manifest.bytes()) - sum(size for _, size, _ in self._tars("[!.]*.tar"))
            check_space(self.folder, wanted, "lower --cache-size or choose another --cache-dir")
            store = open_store(self.url)
            run_tasks(prepare, [*self._shards.values()], lambda shard: 1, _JOBS, on_progress)

    def open(self, name: str, attempts: int | None = None) -> int:
        """Return a descriptor of a whole shard, open for reading; fetch the shard if it is not cached.

        Raises FractalError, naming the shard, if it cannot be fetched in ``attempts`` tries; None is the usual number.
        """
        shard = self._shards[name]
        descriptor = self._open_whole(shard)
        if descriptor is None:
            with self._lock(name):
                descriptor = self._open_whole(shard)
                if descriptor is None:
                    descriptor = self._fetch(shard, attempts)
        _mark_used(descriptor)
        return descriptor

    def prefetch(self, name: str) -> None:
        """Try once to fetch a shard; when it is needed, ``open`` tries again."""
        with suppress(FractalError, OSError):
            os.close(self.open(name, attempts=1))

    def first_that_fit(self, names: Sequence[str]) -> list[str]:
        """Return the first of these shards, as many as the cache holds together; cached ones count as used now."""
        ends = accumulate(self._shards[name].bytes for name in names)
        fitting = [name for name, end in zip(names, ends, strict=True) if end <= self.size]
        for name in fitting:
            if (descriptor := self._open_whole(self._shards[name])) is not None:
                _mark_used(descriptor)
                os.close(descriptor)
        return fitting

    def _fetch(self, shard: Shard, attempts: int | None) -> int:
        """Fetch a shard whose lock is held, once there is room for it, and open it."""
        (self.folder / shard.name).unlink(missing_ok=True)  # a damaged one
        with atomic_file(self.folder / shard.name) as file:
            with self._lock("room"):
                while not self._make_room(shard.bytes):
                    time.sleep(_POLL_SECONDS)  # others are fetching; what they have fetched can make room
                file.truncate(shard.bytes)
            info = FileInfo(shard.bytes, shard.sha256)
            _store_of_process(self.url, os.getpid()).fetch(shard.name, file, info, attempts)
            return os.open(file.name, os.O_RDONLY | os.O_CLOEXEC)  # before another process can remove it

    def _make_room(self, size: int) -> bool:
        """Remove shards until ``size`` bytes are free, the least recently used first; return whether they are."""
        remove_leftovers(self.folder)
        coming, here = self._tars(f"{TEMPORARY}*.tar"), self._tars("[!.]*.tar")  # one that arrives now counts twice
        free = self.size - sum(cached for _, cached, _ in coming + here)
        for _, cached, path in sorted(here):
            if free < size:
                path.unlink(missing_ok=True)
                free += cached
        return free >= size

    def _tars(self, pattern: str) -> list[tuple[int, int, Path]]:
        """Return (last use in ns, bytes, path) of matching files in the folder."""
        found = []
        for path in self.folder.glob(pattern):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        return found

    def _open_whole(self, shard: Shard) -> int | None:
        try:
            descriptor = os.open(self.folder / shard.name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size == shard.bytes:
            return descriptor
        os.close(descriptor)
        return None

    def _lock(self, name: str) -> FileLock:
        return FileLock(self.folder / "locks" / name)


@functools.lru_cache(maxsize=4)
def _store_of_process(url: str, process: int) -> Store:
    """Return the store of this process: connections do not survive a fork."""
    return open_store(url)


def _mark_used(descriptor: int) -> None:
    with suppress(PermissionError):  # another user's, in a shared cache: it counts as used when it arrived
        os.utime(descriptor, ns=(time.time_ns(), time.time_ns()))


def open_cache(url: str, root: Path | None, size: int, window: int, split: str) -> ShardCache:
    """Return the cache of a remote dataset, in a folder of ``root`` named by its content digest; fetch no shards.

    ``root`` must be the user's own, because shards are hashed when they arrive and not at every use; for the default
    see ``cache_root``. ``window`` shards of ``split`` are needed together.
    """
    manifest = read_manifest(open_store(url)).manifest
    cache = ShardCache(url, cache_root(root) / manifest.content_digest(), size, manifest)
    cache.check_window(window, split)
    return cache


def cache_root(folder: str | os.PathLike[str] | None) -> Path:
    """Return the folder of all caches: the given one, or ``private_cache``, on scratch space where there is some."""
    root = private_cache(scratch=True) if folder is None else Path(folder)
    if root is None:
        raise FractalError("neither the home folder nor $TMPDIR is writable; choose a --cache-dir")
    return root


@contextmanager
def prefetching(cache: ShardCache, split: str) -> Iterator[Callable[[Sequence[int]], None]]:
    """Run a process that fetches shards of a split ahead; yield the function to call with those needed next.

    It takes their numbers in the split, soonest first. As many are fetched as the cache holds together. A call replaces
    the request before it, except for shards that are being fetched; the same request again does nothing. A thread could
    hold locks while a training forks its loader workers; a process cannot.
    """
    names = [shard.name for shard in cache.manifest.splits[split]]
    requested: Sequence[int] = ()
    # -P: without the current folder on its path. In its own session, so that Ctrl-C does not reach it; it ends with its
    # input, when this process ends.
    command = [sys.executable, "-P", "-c", f"from {__name__} import run_prefetcher; run_prefetcher()"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    stdin = cast(BinaryIO, process.stdin)

    def send(message: object) -> None:
        with suppress(OSError):  # if it was killed, ``open`` fetches the shards
            pickle.dump(message, stdin)
            stdin.flush()

    def request(shards: Sequence[int]) -> None:
        nonlocal requested
        if shards != requested:
            requested = shards
            send([names[shard] for shard in shards])

    send(cache)
    try:
        yield request
    finally:
        process.kill()
        with suppress(OSError):
            process.communicate()


def run_prefetcher() -> None:
    """Read the cache, then lists of names, from standard input: the main function of the prefetching process."""
    cache: ShardCache = pickle.load(sys.stdin.buffer)
    pool, pending = ThreadPoolExecutor(_PREFETCH_JOBS), list[Future[None]]()
    with suppress(EOFError, pickle.UnpicklingError):  # the other process ended, perhaps while it was writing
        while True:
            names = pickle.load(sys.stdin.buffer)
            for future in pending:
                future.cancel()
            pending = [pool.submit(cache.prefetch, name) for name in cache.first_that_fit(names)]
    os._exit(0)  # without waiting for shards that are being fetched
