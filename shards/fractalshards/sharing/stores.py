"""What a folder that lies elsewhere can do: a source gives bytes, a store takes them too; and what goes wrong there."""

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError
from fractalshards.files import regular_size
from fractalshards.human import one_line
from fractalshards.sharing.urls import redact

_T = TypeVar("_T")
_CHUNK = 1 << 18  # of a local file; stays in a core's cache from reading to hashing and writing
_DENIED = "access denied; check credentials and permissions"
_PERMANENT = {  # by name, for their packages may not be there
    "ClientConnectorCertificateError": "certificate not valid",
    "InvalidURL": "not a URL",
    "NoCredentialsError": "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or "
    "FSSPEC_S3_ANON=true for a public bucket",
    "ParamValidationError": "not a valid bucket or key",
    "PartialCredentialsError": "credentials are incomplete",
    "ProfileNotFound": "no such AWS profile",
    "RepositoryNotFoundError": "no such repository, or a private one; log in with 'hf auth login'",
}
_AGAIN = (408, 409, 412, 425, 429)  # 409 and 412: somebody else wrote meanwhile

Advance = Callable[[int], None]
"""Called with the bytes that were moved; a negative number takes back what must be moved again."""

Change = Callable[[bytes | None], bytes]
"""Makes a small file's new content of what it is now; None: it is not there."""


class StoreError(Exception):
    """Something went wrong elsewhere: a line without secrets, and whether to try again."""

    def __init__(self, what: str, permanent: bool = False, missing: bool = False) -> None:
        super().__init__(what)
        self.permanent = permanent
        self.missing = missing


class MismatchError(StoreError):
    """All bytes came, and they are not those promised."""


@dataclass(frozen=True)
class Told:
    """What a store says of a file without reading it: its size, and its sha256 where it knows."""

    size: int
    sha256: str | None


@dataclass(frozen=True)
class Upload:
    """What is to be stored as ``name``: a local file, or bytes, and what it must turn out to be."""

    name: str
    content: Path | bytes
    told: Told

    @classmethod
    def of_file(cls, path: Path) -> "Upload":
        """A local file as it is now, under its own name."""
        return cls(path.name, path, Told(regular_size(path), sha256_file(path)))

    @classmethod
    def of_bytes(cls, name: str, data: bytes) -> "Upload":
        """A small file that is nowhere yet."""
        return cls(name, data, Told(len(data), hashlib.sha256(data).hexdigest()))

    def pieces(self) -> Iterator[bytes | memoryview]:
        """Its bytes, in pieces that last until the next one is taken.

        Raises:
            FractalError: in the end, if they were not those promised; no more than promised are read.
            OSError: as the local file system does.
        """
        digest, left = hashlib.sha256(), self.told.size
        sound = isinstance(self.content, bytes) or regular_size(self.content) == left
        for piece in [self.content] if isinstance(self.content, bytes) else file_pieces(self.content, 0):
            if not sound or len(piece) > left:
                break
            digest.update(piece)
            left -= len(piece)
            yield piece
        if not sound or left or digest.hexdigest() != self.told.sha256:
            folder = self.content.parent if isinstance(self.content, Path) else ""
            raise FractalError(f"{folder}/{self.name}: not what the manifest says; run 'fractalshards verify {folder}'")

    def check(self) -> None:
        """Raise FractalError if the local file is not what it must be."""
        for _ in self.pieces():
            pass


class Source(Protocol):
    """Files of one folder. All methods raise StoreError, local ones OSError, and are safe from many threads."""

    @property
    def steady(self) -> bool:
        """Whether a file that is read again has the same bytes, for nothing on the way could damage them."""

    def chunks(self, name: str, start: int) -> Generator[bytes | memoryview]:
        """A file's bytes from ``start`` on, in pieces that fit into memory and last until the next one is taken.

        They may end early or late.
        """


class Store(Source, Protocol):
    """A folder that can be written to."""

    @property
    def tells(self) -> bool:
        """Whether ``told`` knows the sha256 of all that ``put`` stored."""

    @property
    def together(self) -> int:
        """How many shards go in one ``put``."""

    @property
    def wants_card(self) -> bool:
        """Whether a ``README.md`` says there how the dataset is read."""

    def prepare(self) -> None:
        """Make the folder, where folders need making, and remove what killed writers left there."""

    def told(self, name: str) -> Told | None:
        """What the store says of a file; None if it is not there."""

    def put(self, uploads: Sequence[Upload], advance: Advance) -> None:
        """Store files in this order, each visible only when it is whole, and check what arrived.

        Raises:
            FractalError: if a local file is not what it must be.
            MismatchError: if what arrived is not that.
        """

    def update(self, name: str, most: int, change: Change) -> None:
        """Write what ``change`` makes of a small file, if it differs; nothing that others write meanwhile is lost.

        Where the store can tell that somebody else wrote meanwhile this fails, and is to be tried again.
        """


def file_pieces(path: Path, start: int) -> Generator[bytes | memoryview]:
    """Bytes of a regular local file from ``start`` on; each piece lasts until the next one is taken.

    Raises:
        FractalError: if it is not a regular file.
        OSError: as the file system does.
    """
    regular_size(path)
    buffer = memoryview(bytearray(_CHUNK))  # new memory for every piece would cost as much as the copy
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while count := file.readinto(buffer):
            yield buffer[:count]


def read_small(source: Source, name: str, most: int) -> bytes | None:
    """A file of at most ``most`` bytes; None if it is not there.

    Raises:
        StoreError: if it is larger, or cannot be read.
    """
    data = bytearray()
    try:
        with closing(source.chunks(name, 0)) as chunks:
            for chunk in chunks:
                data += chunk
                if len(data) > most:
                    raise StoreError(f"larger than {most >> 20} MiB; do not use it", permanent=True)
    except FileNotFoundError:
        return None
    except StoreError as error:
        if error.missing:
            return None
        raise
    return bytes(data)


def read_back(source: Source, name: str) -> Told:
    """Size and sha256 of a file, by reading it."""
    digest, size = hashlib.sha256(), 0
    for chunk in source.chunks(name, 0):
        digest.update(chunk)
        size += len(chunk)
    return Told(size, digest.hexdigest())


def check_arrived(store: Store, upload: Upload) -> None:
    """Ask the store what it has of a file; read it back where the store cannot tell.

    Raises:
        MismatchError: if that is not what was sent.
    """
    told = store.told(upload.name)
    if told and told.sha256 is None:
        told = read_back(store, upload.name)
    if told != upload.told:
        raise MismatchError(f"arrived as {told.size if told else 'no'} bytes with another sha256")


@contextmanager
def translated(local: Path | bytes | None = None) -> Iterator[None]:
    """Turn whatever a store's package raises into StoreError; errors of the file ``local`` stay what they are."""
    try:
        yield
    except (StoreError, FractalError, ImportError):
        raise
    except Exception as error:
        if isinstance(local, Path) and isinstance(error, OSError) and error.filename == str(local):
            raise
        raise _explain(error) from error


def if_there(ask: Callable[[], _T]) -> _T | None:
    """What a store's package answers; None if the file is not there. Raises StoreError for all else."""
    try:
        with translated():
            return ask()
    except StoreError as error:
        if error.missing:
            return None
        raise


def _explain(error: Exception) -> StoreError:
    known = next((text for kind in type(error).__mro__ if (text := _PERMANENT.get(kind.__name__))), None)
    if known:
        return StoreError(known, permanent=True)
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, FileNotFoundError) or status == 404:
        return StoreError("not there; check the URL", permanent=True, missing=True)
    if isinstance(error, PermissionError) or status in (401, 403):
        return StoreError(_DENIED, permanent=True)
    if status == 416:
        return StoreError("shorter than promised", permanent=True)
    permanent = isinstance(status, int) and 400 <= status < 500 and status not in _AGAIN
    text = f"the server answers {status}" if isinstance(status, int) else str(error) or type(error).__name__
    return StoreError(redact(one_line(text))[:200], permanent)
