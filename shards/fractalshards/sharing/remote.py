"""A dataset's folder somewhere else: fetches and stores single files, again where it fails, checked by size and sha256.

A file that is fetched appears only when it is whole and right. A download that breaks goes on where it broke; one that
arrives damaged starts again; more bytes than promised are never read. A file that is stored is checked where it
arrived, see ``Remote.send``.
"""

import hashlib
import random
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from fractalshards.atomic import atomic_file
from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError, UsageError
from fractalshards.sharing.stores import LocalStore, Store, StoreError, Told, open_store, read_back
from fractalshards.sharing.urls import parse_location

_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before trying again, times 0.5 to 1.5; a minute in all
AGAIN = len(_DELAYS)
_FEW = 2  # times to try again where a URL was probably mistyped, or the bytes come from a damaged copy
_T = TypeVar("_T")

Advance = Callable[[int], None]
"""Called with the bytes that were moved; a negative number takes back what must be moved again."""


class MismatchError(StoreError):
    """All bytes came, and they are not those promised."""


@dataclass(frozen=True)
class Remote:
    """A folder that ``store`` reaches, ``shown`` in messages.

    ``wait`` sleeps, for it may be made to end early; ``again`` is how often something that fails is tried again.
    """

    store: Store
    shown: str
    wait: Callable[[float], None] = time.sleep
    again: int = AGAIN

    def read(self, name: str, limit: int, again: int = _FEW) -> bytes | None:
        """A small file of at most ``limit`` bytes; None if it is not there.

        Raises:
            FractalError: if it is larger, or cannot be read.
        """

        def read() -> bytes | None:
            data = bytearray()
            try:
                with closing(self.store.chunks(name, 0)) as chunks:
                    for chunk in chunks:
                        data += chunk
                        if len(data) > limit:
                            raise FractalError(f"{self.shown}/{name}: larger than {limit >> 20} MiB; do not use it")
            except FileNotFoundError:
                return None
            except StoreError as error:
                if error.missing:
                    return None
                raise
            return bytes(data)

        return self._persist(name, read, again)

    def fetch(self, name: str, path: Path, size: int, sha256: str, advance: Advance) -> None:
        """Fetch a file to ``path``, which appears when size and sha256 are those given.

        Raises:
            FractalError: if the file is not there, its bytes are others three times, or nothing came for a minute.
            OSError: as the local file system does.
        """
        with atomic_file(path) as file:
            download = _Download(self.store, name, file, size, sha256, advance)
            self._persist(name, download.go_on, progress=lambda: download.got)

    def send(self, path: Path, name: str, size: int, sha256: str, advance: Advance) -> None:
        """Store a local file, and check what arrived.

        A local file of other size or sha256 is refused. The other end is checked by its size and its sha256: in a
        folder the sha256 of the bytes as they were written; on S3 (files of up to 5 GiB) and for large files on
        Hugging Face that which the store computed; elsewhere by reading the file back.

        Raises:
            FractalError: if the local file is not that, or it cannot be stored.
            OSError: as the local file system does.
        """
        if isinstance(self.store, LocalStore):
            source = Remote(LocalStore(path.parent), str(path.parent), self.wait)
            source.fetch(path.name, self.store.folder / name, size, sha256, advance)
            return
        if path.stat().st_size != size or sha256_file(path) != sha256:
            raise FractalError(f"{path}: not what the manifest says; run 'fractalshards verify {path.parent}'")

        def send() -> None:
            self.store.put(path, name, sha256)
            if (found := self.told(name)) != Told(size, sha256):
                raise MismatchError(f"arrived as {found.size if found else 'no'} bytes with another sha256")

        self._persist(name, send)
        advance(size)

    def told(self, name: str) -> Told | None:
        """Size and sha256 of a file there, read back where the store cannot tell; None if it is not there."""
        told = self.store.told(name)
        return read_back(self.store, name) if told and told.sha256 is None else told

    def holds(self, name: str, size: int, sha256: str) -> bool:
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


def open_remote(
    url: str, wait: Callable[[float], None] = time.sleep, write: bool = False, again: int = AGAIN
) -> Remote:
    """The folder at a local path or a URL; nothing is asked of it yet. For ``wait`` and ``again`` see ``Remote``.

    Raises:
        UsageError: for URLs that are not taken, and for those of web servers if it shall be written to.
        FractalError: if a package is missing.
    """
    location = parse_location(url)
    if write and location.scheme == "http":
        raise UsageError(f"{location.shown}: web servers are read only; give a local folder, s3://, gs:// or hf://")
    return Remote(open_store(location), location.shown, wait, again)


class _Download:
    """A download that can break, and go on where it broke."""

    def __init__(self, store: Store, name: str, file: BinaryIO, size: int, sha256: str, advance: Advance) -> None:
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
            permanent = isinstance(self._store, LocalStore)
            raise MismatchError("damaged, its sha256 is not that in the manifest; it must be pushed again", permanent)

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
