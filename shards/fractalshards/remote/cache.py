"""A bounded local folder of the shards of a dataset that lies elsewhere, shared by all processes of a machine.

    FOLDER/train-000000.json   sidecar records, all of them
    FOLDER/train-000007.tar    shards, those needed last, whole and checked
    FOLDER/locks/              one lock per shard, held while it is fetched or removed

Whoever needs a shard first fetches it, the others wait for its lock; a process that is killed lets go of it. Room is
made by removing the shards whose last use is longest ago. Files that are open stay readable when they are removed.
"""

import multiprocessing
import os
import shutil
import signal
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError, UsageError
from fractalshards.human import human_bytes
from fractalshards.manifest import Manifest, Shard
from fractalshards.remote.stores import Advance, Source
from fractalshards.remote.transfer import (
    AGAIN,
    Brake,
    Meter,
    Remote,
    Work,
    entries,
    fetch_sidecar,
    is_described,
    open_remote,
    read_listing,
    run_threads,
    shard_number,
)
from fractalshards.storage import file_lock, free_lock, remove_leftovers
from fractalshards.workers import end_with_parent

_JOBS = 8
_LOCKS = "locks"
_POLL_SECONDS = 0.1


class ShardCache:
    """The shards of one dataset, of which at most ``size`` bytes are here at a time.

    Use it in any number of processes, each with an object of its own or one inherited by fork or pickle.
    """

    def __init__(self, url: str, folder: Path, size: int, manifest: Manifest, again: int = AGAIN) -> None:
        """Open a cache that ``prepare`` has made; for ``again`` see ``Remote``."""
        self.url = url
        self.folder = folder
        self.size = size
        self.manifest = replace(manifest, folder=folder)
        self._again = again
        self._shards = {entry.shard.name: entry.shard for entry in entries(manifest)}
        self._remote: tuple[int, Remote[Source]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Of another process, which has no connection yet."""
        return {**self.__dict__, "_remote": None}

    def prepare(self, meter: Meter) -> None:
        """Fetch the sidecars that are missing, and remove shards that were damaged here since they were fetched.

        Raises:
            FractalError: if a sidecar cannot be had, or the disk has no room for the cache.
            OSError: as the local file system does.
        """
        (self.folder / _LOCKS).mkdir(parents=True, exist_ok=True)
        with file_lock(self.folder / _LOCKS / "prepare"):
            remove_leftovers(self.folder)
            self._check_space()
            work = Work(_JOBS, meter, Brake())
            remote = open_remote(self.url, work.brake.wait)

            def fetch(shard: Shard, advance: Advance) -> None:
                fetch_sidecar(remote, self.folder, self.manifest, shard)
                advance(1)

            def check(shard: Shard, advance: Advance) -> None:
                self._remove_if_damaged(shard)
                advance(shard.bytes)

            listed = entries(self.manifest)
            missing = [e.shard for e in listed if not is_described(self.folder, self.manifest, e.shard)]
            work.each("fetching records", len(missing), "shards", missing, fetch)
            work.move("checking the cache", [e for e in listed if (self.folder / e.shard.name).exists()], check)

    def open(self, name: str) -> int:
        """A descriptor of a whole shard, open for reading; it is fetched if it is not here.

        Raises:
            FractalError: naming the shard, if it cannot be had.
            OSError: as the local file system does.
        """
        shard = self._shards[name]
        descriptor = self._open_whole(shard)
        if descriptor is None:
            with file_lock(self._lock(name)) as lock:
                descriptor = self._open_whole(shard)
                while descriptor is None:  # once, unless somebody else empties the folder
                    self._fetch(shard, lock)
                    descriptor = self._open_whole(shard)
        _mark_used(descriptor)
        return descriptor

    def ensure(self, name: str) -> None:
        """Fetch a shard if it is not here, and keep it as if it had been used now; raises as ``open`` does."""
        os.close(self.open(name))

    def keep(self, name: str) -> None:
        """Keep a shard, if it is here, as if it had been used now."""
        descriptor = self._open_whole(self._shards[name])
        if descriptor is not None:
            _mark_used(descriptor)
            os.close(descriptor)

    def fitting(self, names: Sequence[str]) -> list[str]:
        """The first of these shards, as many as can be here together."""
        ends = accumulate(self._shards[name].bytes for name in names)
        return [name for name, end in zip(names, ends, strict=True) if end <= self.size]

    def _fetch(self, shard: Shard, lock: int) -> None:
        """Fetch a shard whose lock is held; meanwhile the lock's file says how much room it takes."""
        path = self.folder / shard.name
        path.unlink(missing_ok=True)  # a damaged one, which nobody else can remove now
        self._make_room(shard, lock)
        try:
            self._connect().fetch(shard.name, path, shard.bytes, shard.sha256, lambda count: None)
        finally:
            os.ftruncate(lock, 0)

    def _make_room(self, shard: Shard, lock: int) -> None:
        """Reserve room for a shard; waits where the room is taken by shards that are on their way, or just opened."""
        os.ftruncate(lock, 0)  # a killed process may have reserved room for this shard, too
        while True:
            with file_lock(self.folder / _LOCKS / "room"):
                remove_leftovers(self.folder)
                coming = dict(self._coming())
                here = self._here()  # later, so that what arrives in between counts, and not twice
                for _, _, path in here:
                    coming.pop(path.name, None)
                free = self.size - sum(coming.values()) - sum(size for _, size, _ in here)
                busy = bool(coming)
                for _, size, path in sorted(here):
                    if free < shard.bytes:
                        removed = self._remove(path)
                        busy |= not removed
                        free += size * removed
                if free >= shard.bytes:
                    os.pwrite(lock, str(shard.bytes).encode(), 0)
                    return
                if not busy:
                    raise FractalError(
                        f"{self.folder}: no room for {shard.name} ({human_bytes(shard.bytes)}) in a cache of "
                        f"{human_bytes(self.size)}; raise --cache-size"
                    )
            time.sleep(_POLL_SECONDS)

    def _check_space(self) -> None:
        wanted = min(self.size, self.manifest.bytes())
        total, _, free = shutil.disk_usage(self.folder)
        if total and wanted > free + sum(size for _, size, _ in self._here()):
            raise FractalError(
                f"{self.folder}: a cache of {human_bytes(wanted)} does not fit, the disk has {human_bytes(free)} free; "
                "lower --cache-size or choose another --cache-dir"
            )

    def _here(self) -> list[tuple[int, int, Path]]:
        """(last use in ns, bytes, path) of every shard that is here."""
        found = []
        for entry in os.scandir(self.folder):
            if entry.name in self._shards:
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    found.append((status.st_atime_ns, status.st_size, Path(entry.path)))
        return found

    def _coming(self) -> Iterator[tuple[str, int]]:
        """(name, bytes) of the shards that are being fetched: a lock that is free was left by a killed process."""
        for entry in os.scandir(self.folder / _LOCKS):
            if entry.name in self._shards and entry.stat().st_size:
                with free_lock(Path(entry.path)) as free:
                    text = b"" if free else Path(entry.path).read_bytes()
                if text.isdigit():
                    yield entry.name, int(text)

    def _remove(self, path: Path) -> bool:
        """Remove a shard, unless it is just being fetched or opened."""
        with free_lock(self._lock(path.name)) as free:
            if free:
                path.unlink(missing_ok=True)
            return free

    def _open_whole(self, shard: Shard) -> int | None:
        try:
            descriptor = os.open(self.folder / shard.name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size == shard.bytes:
            return descriptor
        os.close(descriptor)
        return None

    def _remove_if_damaged(self, shard: Shard) -> None:
        path = self.folder / shard.name
        with suppress(FileNotFoundError):  # another training on this machine may have removed it
            if path.stat().st_size != shard.bytes or sha256_file(path) != shard.sha256:
                with file_lock(self._lock(shard.name)):
                    path.unlink()

    def _connect(self) -> Remote[Source]:
        """The remote folder; connections do not survive a fork, so each process has its own."""
        if self._remote is None or self._remote[0] != os.getpid():
            self._remote = (os.getpid(), open_remote(self.url, again=self._again))
        return self._remote[1]

    def _lock(self, name: str) -> Path:
        return self.folder / _LOCKS / name


def open_cache(url: str, root: Path | None, size: int, window: int, split: str) -> ShardCache:
    """The cache of a dataset elsewhere, in a folder of ``root`` named by its content digest; nothing is fetched yet.

    Args:
        root: None: ``$TMPDIR/fractalpretrain-UID`` where batch systems set it, else ``~/.cache/fractalpretrain``; it is
            made, and must be the user's own, for shards are hashed when they come and not at every use.
        size: bytes of shards that may be here at a time.
        window: shards of ``split`` that are needed together.

    Raises:
        UsageError: if that many may not fit.
        FractalError: if there is no dataset, or others can write to the default root.
        OSError: if that cannot be made.
    """
    remote = open_remote(url)
    manifest = read_listing(remote).manifest
    for entry in entries(manifest):
        shard_number(entry.shard.name, remote.shown)  # whose sidecar is no other file
    sizes = {name: [shard.bytes for shard in shards] for name, shards in manifest.splits.items()}
    least = max(sum(sorted(sizes.get(split, []))[-window:]), *(max(part, default=0) for part in sizes.values()))
    if size < least:
        raise UsageError(
            f"a cache of {human_bytes(size)} does not hold the {window} shards that are shuffled together "
            f"({human_bytes(least)}); raise --cache-size or lower --window"
        )
    return ShardCache(url, (root or _private(_default_root())) / manifest.content_digest(), size, manifest)


def _mark_used(descriptor: int) -> None:
    """The time of access says when a shard was last needed; file systems themselves keep it only roughly."""
    os.utime(descriptor, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))


def _default_root() -> Path:
    if temporary := os.environ.get("TMPDIR"):
        return Path(temporary) / f"fractalpretrain-{os.getuid()}"  # it may be one that all users share
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fractalpretrain"


def _private(folder: Path) -> Path:
    """Make a folder that only this user may enter; one that is there must be the user's, and no link."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise FractalError(f"{folder}: other users can write there, so no place for a cache; choose a --cache-dir")
    return folder


_PREFETCH_JOBS = 4
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
    run_threads([partial(fetch, name) for name in fitting], _PREFETCH_JOBS, Brake())
