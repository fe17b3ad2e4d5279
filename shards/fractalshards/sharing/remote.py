"""A dataset's folder somewhere else: fetches and stores single files, again where it fails, checked by size and sha256.

A file that is fetched appears only when it is whole and right. A download that breaks goes on where it broke; one that
arrives damaged starts again; more bytes than promised are never read. A file that is stored is checked where it
arrived, see ``Remote.send``.
"""

import hashlib
import random
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from fractalshards.atomic import atomic_file
from fractalshards.errors import FractalError, UsageError
from fractalshards.sharing.folders import LocalStore
from fractalshards.sharing.hub import HubStore
from fractalshards.sharing.objects import GoogleStore, S3Store
from fractalshards.sharing.stores import (
    Advance,
    Change,
    MismatchError,
    Source,
    Store,
    StoreError,
    Upload,
    read_back,
    read_small,
)
from fractalshards.sharing.urls import Location, parse_location
from fractalshards.sharing.web import HttpSource

_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before trying again, times 0.5 to 1.5; a minute in all
AGAIN = len(_DELAYS)
_FEW = 2  # times to try again where a URL was probably mistyped, or the bytes come from a damaged copy
_T = TypeVar("_T")
_S = TypeVar("_S", bound=Source, covariant=True)
_STORES: dict[str, Callable[[Location], Store]] = {"s3": S3Store, "gs": GoogleStore, "hf": HubStore}


@dataclass(frozen=True)
class Remote(Generic[_S]):
    """A folder that ``store`` reaches, ``shown`` in messages; it can be written to if that is a ``Store``.

    ``wait`` sleeps, for it may be made to end early; ``again`` is how often something that fails is tried again.
    """

    store: _S
    shown: str
    wait: Callable[[float], None] = time.sleep
    again: int = AGAIN

    def read(self, name: str, limit: int, again: int = _FEW) -> bytes | None:
        """A small file of at most ``limit`` bytes; None if it is not there.

        Raises:
            FractalError: if it is larger, or cannot be read.
        """
        return self._persist(name, lambda: read_small(self.store, name, limit), again)

    def fetch(self, name: str, path: Path, size: int, sha256: str, advance: Advance) -> None:
        """Fetch a file to ``path``, which appears when size and sha256 are those given.

        Raises:
            FractalError: if the file is not there, its bytes are others three times, or nothing came for a minute.
            OSError: as the local file system does.
        """
        with atomic_file(path) as file:
            download = _Download(self.store, name, file, size, sha256, advance)
            self._persist(name, download.go_on, progress=lambda: download.got)

    def send(self: "Remote[Store]", uploads: Sequence[Upload], advance: Advance) -> None:
        """Store files in this order, and check what arrived.

        A local file of other size or sha256 is refused. The other end is checked by its size and its sha256: in a
        folder the sha256 of the bytes as they were written; on S3 (files of up to 5 GiB) and for large files on
        Hugging Face that which the store computed; elsewhere by reading the file back.

        Raises:
            FractalError: if a local file is not that, or it cannot be stored.
            OSError: as the local file system does.
        """
        self._persist(uploads[0].name, lambda: self.store.put(uploads, advance))

    def update(self: "Remote[Store]", name: str, most: int, change: Change) -> None:
        """Write what ``change`` makes of a small file; see ``Store.update``. It may be called several times.

        Raises:
            FractalError: as ``change`` does, or if the file cannot be read or stored.
            OSError: as the local file system does.
        """
        self._persist(name, lambda: self.store.update(name, most, change))

    def holds(self: "Remote[Store]", name: str, size: int, sha256: str) -> bool:
        """Whether a file is there that was stored as this.

        A store that cannot tell the sha256 (gs) is believed by size; another one that does not know it of this file
        did not get it from ``send``, and it is read.

        Raises:
            FractalError: if it cannot be found out.
        """

        def compare() -> bool:
            told = self.store.told(name)
            if told is None or told.size != size:
                return False
            if told.sha256 is None and self.store.tells:
                told = read_back(self.store, name)
            return told.sha256 in (sha256, None)

        return self._persist(name, compare)

    def _persist(
        self, name: str, action: Callable[[], _T], again: int | None = None, progress: Callable[[], int] = lambda: 0
    ) -> _T:
        """What ``action`` returns, in the end; where ``progress`` grows between failures they do not add up."""
        again = self.again if again is None else again
        failures = mismatches = reached = 0
        while True:
            try:
                return action()
            except StoreError as error:
                if progress() > reached:
                    failures, reached = 0, progress()
                failures += 1
                mismatches += isinstance(error, MismatchError)
                if error.permanent or failures > again or mismatches > _FEW:
                    tries = "" if error.permanent else f" (tried {failures} times)"
                    raise FractalError(f"{self.shown}/{name}: {error}{tries}") from error
            self.wait(_DELAYS[min(failures, len(_DELAYS)) - 1] * random.uniform(0.5, 1.5))


def open_remote(url: str, wait: Callable[[float], None] = time.sleep, again: int = AGAIN) -> Remote[Source]:
    """The folder at a local path or a URL; nothing is asked of it yet. For ``wait`` and ``again`` see ``Remote``.

    Raises:
        UsageError: for URLs that are not taken.
        FractalError: if a package is missing.
    """
    location = parse_location(url)
    source = HttpSource(location) if location.scheme == "http" else _open_store(location)
    return Remote(source, location.shown, wait, again)


def open_destination(url: str, wait: Callable[[float], None] = time.sleep) -> Remote[Store]:
    """The folder at a local path or a URL, to write to; else as ``open_remote``.

    Raises:
        UsageError: for URLs of web servers, too.
    """
    location = parse_location(url)
    if location.scheme == "http":
        raise UsageError(f"{location.shown}: web servers are read only; give a local folder, s3://, gs:// or hf://")
    return Remote(_open_store(location), location.shown, wait)


def _open_store(location: Location) -> Store:
    if location.scheme == "file":
        return LocalStore(Path(location.root))
    try:
        return _STORES[location.scheme](location)
    except StoreError as error:
        raise FractalError(f"{location.shown}: {error}") from error


class _Download:
    """A download that can break, and go on where it broke."""

    def __init__(self, store: Source, name: str, file: BinaryIO, size: int, sha256: str, advance: Advance) -> None:
        self.got = 0
        self._store = store
        self._name = name
        self._file = file
        self._size = size
        self._sha256 = sha256
        self._advance = advance
        self._digest = hashlib.sha256()

    def go_on(self) -> None:
        """Fetch what is missing.

        Raises:
            StoreError: if it breaks, or all is there but is not what was promised; then it will start again.
        """
        with closing(self._store.chunks(self._name, self.got)) as chunks:
            while self.got < self._size and (chunk := next(chunks, b"")):
                self._keep(memoryview(chunk)[: self._size - self.got])
        if self.got < self._size:
            raise StoreError(f"ends after {self.got:,} of {self._size:,} bytes")
        if self._digest.hexdigest() != self._sha256:
            self._start_again()
            text = "damaged, its sha256 is not that in the manifest; it must be pushed again"
            raise MismatchError(text, permanent=self._store.steady)

    def _keep(self, piece: memoryview) -> None:
        self._file.write(piece)
        self._digest.update(piece)
        self.got += len(piece)
        self._advance(len(piece))

    def _start_again(self) -> None:
        self._advance(-self.got)
        self.got = 0
        self._digest = hashlib.sha256()
        self._file.seek(0)
        self._file.truncate()
