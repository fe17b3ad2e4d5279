"""Reads and writes files of a folder that lies elsewhere: a local path, a web server, an object store."""

import base64
import hashlib
import importlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError
from fractalshards.human import one_line
from fractalshards.sharing.urls import Location, redact

_CHUNK = 1 << 18  # of a local file; stays in a core's cache from reading to hashing and writing
_STREAM = 1 << 20  # of a web server: each piece is a turn of another thread
_BLOCK = 8 << 20  # of an object store, where every block is a request
_SINGLE_PUT = 5 * 2**30  # what S3 takes in one request
_TIMEOUT = 30.0
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
_AGAIN = (408, 425, 429)
_INSTALL = {
    "http": ("aiohttp", "pip install aiohttp"),
    "s3": ("s3fs", "pip install '.[s3]' in a clone of the project"),
    "gs": ("gcsfs", "pip install gcsfs"),
    "hf": ("huggingface_hub", "pip install '.[hub]' in a clone of the project"),
}


class StoreError(Exception):
    """Something went wrong elsewhere: a line without secrets, and whether to try again."""

    def __init__(self, what: str, permanent: bool = False, missing: bool = False) -> None:
        super().__init__(what)
        self.permanent = permanent
        self.missing = missing


@dataclass(frozen=True)
class Told:
    """What a store says of a file without reading it: its size, and its sha256 where it knows."""

    size: int
    sha256: str | None


class Store(Protocol):
    """Files of one folder. All methods raise StoreError, local ones OSError, and are safe from many threads."""

    @property
    def tells(self) -> bool:
        """Whether ``told`` knows the sha256 of all that ``put`` stored."""

    def chunks(self, name: str, start: int) -> Generator[bytes | memoryview]:
        """A file's bytes from ``start`` on, in pieces that fit into memory and last until the next one is taken.

        They may end early or late.
        """

    def told(self, name: str) -> Told | None:
        """What the store says of a file; None if it is not there."""

    def put(self, path: Path, name: str, sha256: str) -> None:
        """Send a local file of this sha256; the store makes it visible only when it is whole."""


@dataclass(frozen=True)
class LocalStore:
    """A folder of this machine. It is only read; ``Remote.fetch`` writes local files."""

    folder: Path
    tells: ClassVar[bool] = True

    def chunks(self, name: str, start: int) -> Generator[bytes | memoryview]:
        """See ``Store``."""
        buffer = memoryview(bytearray(_CHUNK))  # new memory for every piece would cost as much as the copy
        with (self.folder / name).open("rb", buffering=0) as file:
            file.seek(start)
            while count := file.readinto(buffer):
                yield buffer[:count]

    def told(self, name: str) -> Told | None:
        """See ``Store``. Files are hashed, for that is as fast as reading them."""
        path = self.folder / name
        return Told(path.stat().st_size, sha256_file(path)) if path.is_file() else None

    def put(self, path: Path, name: str, sha256: str) -> None:
        """Not used: what is written here is hashed on the way."""
        raise NotImplementedError


class HttpStore:
    """A folder of a web server: read only."""

    tells = False

    def __init__(self, location: Location) -> None:
        with needed(location.scheme):
            from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=_TIMEOUT, sock_read=_TIMEOUT)
        # proxies come from the environment; the URL is quoted already, and a signature would not survive a second time
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}, "encoded": True}
        self._location = location
        self._files = _filesystem("http", options)

    def chunks(self, name: str, start: int) -> Generator[bytes | memoryview]:
        """See ``Store``."""
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with translated():
            url = self._location.file(name)
            # a block size of 0 streams, and a size, whatever it is, saves asking for it
            options = {"block_size": 0, "size": 1, "headers": headers, "read_bufsize": _STREAM}
            with self._files.open(url, "rb", **options) as file:
                skip = start if file.r.status != 206 else 0  # the server knows no ranges and sends all of it
                while chunk := file.read(_STREAM):
                    if skip < len(chunk):
                        yield chunk[skip:]
                    skip = max(skip - len(chunk), 0)

    def told(self, name: str) -> Told | None:
        """Not used: nothing is sent to web servers."""
        raise NotImplementedError

    def put(self, path: Path, name: str, sha256: str) -> None:
        """Not used: web servers are read only."""
        raise NotImplementedError


class ObjectStore:
    """A folder of an object store that fsspec knows."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self.tells = location.scheme in ("s3", "hf")
        options: dict[str, Any] = {"use_listings_cache": False}
        if location.scheme == "s3":
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}  # ``Remote`` tries again
        with needed(location.scheme), translated():
            self._files = _filesystem(location.scheme, options)
        if location.scheme == "s3":
            self._files.retries = 1

    def chunks(self, name: str, start: int) -> Generator[bytes | memoryview]:
        """See ``Store``."""
        with translated():
            file = self._files.open(self._location.file(name), "rb", block_size=_BLOCK, cache_type="none")
            with file:
                file.seek(start)
                while chunk := file.read(_BLOCK):
                    yield chunk

    def told(self, name: str) -> Told | None:
        """See ``Store``. S3 knows the sha256 of what ``put`` sent, Hugging Face that of large files."""
        path = self._location.file(name)
        try:
            with translated():
                if self._location.scheme == "s3":
                    return self._head(path)
                self._files.invalidate_cache(path)
                info = self._files.info(path)
                return Told(int(info["size"]), (info.get("lfs") or {}).get("sha256"))
        except StoreError as error:
            if error.missing:
                return None
            raise

    def put(self, path: Path, name: str, sha256: str) -> None:
        """See ``Store``. S3 is told the sha256 beforehand and refuses anything else."""
        target = self._location.file(name)
        with translated(path):
            if self._location.scheme != "s3" or path.stat().st_size > _SINGLE_PUT:
                self._files.put_file(str(path), target)
                return
            bucket, key, _ = self._files.split_path(target)
            checksum = {
                "ChecksumAlgorithm": "SHA256",
                "ChecksumSHA256": base64.b64encode(bytes.fromhex(sha256)).decode(),
            }
            with path.open("rb") as file:
                self._files.call_s3("put_object", Bucket=bucket, Key=key, Body=file, **checksum)

    def _head(self, path: str) -> Told:
        bucket, key, _ = self._files.split_path(path)
        head = self._files.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
        checksum = head.get("ChecksumSHA256", "")
        whole = checksum and "-" not in checksum  # otherwise it is one of parts
        return Told(int(head["ContentLength"]), base64.b64decode(checksum).hex() if whole else None)


def open_store(location: Location) -> Store:
    """The store of a location; nothing is asked of it yet.

    Raises:
        FractalError: if a package is missing.
    """
    if location.scheme == "file":
        return LocalStore(Path(location.root))
    try:
        return HttpStore(location) if location.scheme == "http" else ObjectStore(location)
    except StoreError as error:
        raise FractalError(f"{location.shown}: {error}") from error


def read_back(store: Store, name: str) -> Told:
    """Size and sha256 of a file, by reading it."""
    digest, size = hashlib.sha256(), 0
    for chunk in store.chunks(name, 0):
        digest.update(chunk)
        size += len(chunk)
    return Told(size, digest.hexdigest())


@contextmanager
def needed(scheme: str) -> Iterator[None]:
    """Say what to install where the package behind a scheme is missing.

    Raises:
        FractalError: instead of ImportError.
    """
    package, advice = _INSTALL[scheme]
    try:
        yield
    except ImportError as error:
        raise FractalError(f"{scheme}:// needs {package}, which is not installed; run {advice}") from error


@contextmanager
def translated(local: Path | None = None) -> Iterator[None]:
    """Turn whatever a store's package raises into StoreError; errors of the file ``local`` stay what they are."""
    try:
        yield
    except (StoreError, FractalError, ImportError):
        raise
    except Exception as error:
        if local is not None and isinstance(error, OSError) and error.filename == str(local):
            raise
        raise _explain(error) from error


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


def _filesystem(scheme: str, options: dict[str, Any]) -> Any:
    make: Callable[..., Any] = importlib.import_module("fsspec").filesystem
    return make(scheme, skip_instance_cache=True, **options)
