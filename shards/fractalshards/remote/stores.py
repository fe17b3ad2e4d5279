"""The folder of a dataset: a local path, or on a web server, S3, Google Cloud Storage or Hugging Face.

A ``Store`` can ``read`` a small file, ``fetch`` one of known size and sha256, say whether it ``holds`` one, and ``put``
files. fsspec moves the bytes; stores differ in how they write files and check what arrived.
"""

import base64
import errno
import hashlib
import io
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, unquote_to_bytes

from fractalshards.errors import FractalError, UsageError
from fractalshards.human import one_line
from fractalshards.storage import atomic_file, regular_size

_log = logging.getLogger(__name__)

_ROOTS = {
    "file": r"file://(/[^/].*)",
    "http": r"(https?://[^/?#]+(?:/[^?#]*)?)(?:\?([^#]*))?",
    "s3": r"s3://([^/@]+(?:/.*)?)",
    "gs": r"gc?s://([^/@]+(?:/.*)?)",
    "hf": r"hf://(datasets/[^/@]+/[^/@]+(?:@[^/]+)?(?:/.*)?)",
}
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}


@dataclass(frozen=True)
class Location:
    """A folder at a path or URL."""

    scheme: str  # file, http, s3, gs or hf
    root: str  # a path, ``bucket/key``, ``datasets/USER/NAME[@REVISION][/FOLDER]``, or an http URL without its query
    query: str = ""  # of an http URL (a signature or token), appended to the URL of every file

    @property
    def shown(self) -> str:
        """The path or URL without credentials, for messages."""
        scheme = "" if self.scheme in ("file", "http") else f"{self.scheme}://"
        return redact(f"{scheme}{self.root}")

    def file(self, name: str) -> str:
        """Return the path or URL of a file in the folder."""
        return f"{self.root}/{name}" + (f"?{self.query}" if self.query else "")


def parse_location(text: str) -> Location:
    """Parse a local path, in which ``~`` is expanded, or the URL of a folder; raises UsageError for anything else.

    Only schemes that fetch plain bytes are accepted: fsspec would also chain URLs (``simplecache::``) and open
    archives and references that name further files.
    """
    if text and not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text):
        return Location("file", str(Path(os.path.expanduser(text))))
    for scheme, pattern in _ROOTS.items():
        if match := re.fullmatch(pattern, text, re.IGNORECASE):
            root, *query = match.groups("")
            if scheme == "file":
                root = os.fsdecode(unquote_to_bytes(root))
            if "\0" not in root:
                return Location(scheme, root.rstrip("/"), *query)
    raise UsageError(
        f"{redact(text)}: not a folder or supported URL; give a local path, s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, "
        "hf://datasets/USER/NAME or https://HOST/FOLDER; object stores take credentials from their usual places"
    )


def redact(text: str) -> str:
    """Return a text with ``***`` in place of the secrets of its URLs: user, password and query."""
    text = re.sub(r"//[^/@\s]*@", "//***@", text)
    return re.sub(r"(://[^\s'\"<>)?]*)\?[^\s'\"<>),]*", r"\1?***", text)


_LOCAL_CHUNK = 1 << 18  # stays in a core's cache from reading to hashing and writing
_BLOCK = 8 << 20  # of an object store, where every read is a request
_SINGLE_PUT = 5 * 2**30  # bytes that S3 takes in one request
_TIMEOUT = 30.0  # seconds
_RETRY_SECONDS = (1.0, 30.0)  # before the first retry, doubled before each further one, and the longest
_AGAIN = (408, 409, 412, 425, 429)  # HTTP statuses below 500 that may succeed later
_T = TypeVar("_T")


class TemporaryError(FractalError):
    """A store or the network failed, and trying again may help."""


@dataclass(frozen=True)
class FileInfo:
    """Size of a file in bytes, and its sha256, which is empty if a store does not know it."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Upload:
    """A file to store, and the size and sha256 it must have."""

    name: str
    content: Path | bytes
    info: FileInfo

    @classmethod
    def of_bytes(cls, name: str, data: bytes) -> "Upload":
        """Make an upload of bytes in memory."""
        return cls(name, data, FileInfo(len(data), hashlib.sha256(data).hexdigest()))

    def open(self) -> io.BytesIO | io.FileIO:
        """Open the content for reading."""
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else _open_regular(self.content)

    def check(self) -> None:
        """Raise FractalError if the content has another size or sha256; OSError, if it cannot be read."""
        with self.open() as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if FileInfo(file.seek(0, io.SEEK_END), sha256) != self.info:
                where = self.content if isinstance(self.content, Path) else self.name
                raise FractalError(f"{where}: does not match the manifest; run 'fractalshards verify' on its folder")


class Store:
    """A folder on a filesystem of fsspec. Safe to use from many threads, but not after a fork.

    Temporary failures are retried for about a minute. Methods raise FractalError, without the secrets of a URL, if
    a store fails, and FileNotFoundError if a file does not exist.
    """

    attempts = 7  # of an operation in total, unless its call says
    has_checksums = False  # ``holds`` compares sha256, not sizes alone
    batch_size = 1  # shards that one ``put`` should take
    needs_card = False  # a ``README.md`` tells people and ``load_dataset`` what the folder holds
    chunk = _BLOCK  # bytes that are read at a time

    def __init__(self, location: Location, **options: Any) -> None:
        """``options`` are those of the filesystem, which is a new one: shared ones keep listings."""
        import fsspec

        self.location, self.shown = location, location.shown
        options |= {"skip_instance_cache": True, "use_listings_cache": False}
        try:
            self._files: Any = fsspec.filesystem(location.scheme, **options)
        except ImportError as error:
            package = _PACKAGES.get(location.scheme, location.scheme)
            raise FractalError(f"{self.shown}: {error} (pip install {package})") from error

    def read(self, name: str, most: int, attempts: int | None = None) -> bytes | None:
        """Return the contents of a file of at most ``most`` bytes; None if it does not exist."""
        try:
            data = self._persist(lambda: b"".join(self._chunks(name, most + 1)), attempts)
        except FileNotFoundError:
            return None
        if len(data) > most:
            raise FractalError(f"{self.shown}/{name}: larger than {most >> 20} MiB; do not use it")
        return data

    def fetch(self, name: str, file: BinaryIO, info: FileInfo, attempts: int | None = None) -> None:
        """Write the first ``info.size`` bytes of a remote file to ``file``, from its beginning, and check them."""

        def copy() -> None:
            file.seek(0)
            found = self._copy(name, file.write, info.size)
            if found != info:
                what = "sha256 differs" if found.size == info.size else f"ends after {found.size:,} bytes"
                text = f"damaged ({what}), does not match the manifest; it must be pushed again"
                raise TemporaryError(f"{self.shown}/{name}: {text}")

        self._persist(copy, attempts)

    def holds(self, name: str, info: FileInfo) -> bool:
        """Return whether a file is stored already."""
        return self._persist(lambda: self._is_stored(name, info, read_back=self.has_checksums))

    def put(self, uploads: Sequence[Upload]) -> None:
        """Store files in this order, each visible only when it is whole, and check what arrived.

        Raises FractalError also if a local file has another size or sha256 than it must have.
        """

        def send() -> None:
            with self._translated(uploads[0].name):
                self._send(uploads)
            for upload in uploads:
                if not self._is_stored(upload.name, upload.info, read_back=True):
                    raise TemporaryError(f"{self.shown}/{upload.name}: arrived damaged")

        for upload in uploads:
            upload.check()
        self._persist(send)

    def _send(self, uploads: Sequence[Upload]) -> None:
        for upload in uploads:
            path = self.location.file(upload.name)
            if isinstance(upload.content, bytes):
                self._files.pipe_file(path, upload.content)
            else:
                self._files.put_file(str(upload.content), path)

    def _is_stored(self, name: str, info: FileInfo, read_back: bool) -> bool:
        """Compare size and sha256; if the store does not know the sha256, read the file, or accept it."""
        try:
            with self._translated(name):
                found = self._info(self.location.file(name))
            if read_back and not found.sha256 and found.size == info.size:
                found = self._copy(name, lambda chunk: None, info.size + 1)
        except FileNotFoundError:
            return False
        return found.size == info.size and found.sha256 in (info.sha256, "")

    def _info(self, path: str) -> FileInfo:
        self._files.invalidate_cache(path)
        found = self._files.info(path)
        return FileInfo(int(found["size"]), (found.get("lfs") or {}).get("sha256", ""))

    def _copy(self, name: str, write: Callable[[bytes], object], most: int) -> FileInfo:
        """Pass the first ``most`` bytes of a file to ``write``; return their number and sha256."""
        digest, size = hashlib.sha256(), 0
        for chunk in self._chunks(name, most):
            write(chunk)
            digest.update(chunk)
            size += len(chunk)
        return FileInfo(size, digest.hexdigest())

    def _chunks(self, name: str, most: int) -> Iterator[bytes]:
        """Yield the first ``most`` bytes of a file."""
        with self._translated(name), self._open(self.location.file(name)) as file:
            while most and (chunk := file.read(self.chunk)[:most]):
                yield chunk
                most -= len(chunk)

    def _open(self, path: str) -> Any:
        return self._files.open(path, "rb", block_size=_BLOCK, cache_type="none")

    def _persist(self, action: Callable[[], _T], attempts: int | None = None) -> _T:
        """Run an action until it succeeds, fails for good, or has failed ``attempts`` times."""
        import tenacity  # slow to import

        first, longest = _RETRY_SECONDS
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TemporaryError),
            stop=tenacity.stop_after_attempt(attempts or self.attempts),
            wait=tenacity.wait_exponential(first, longest) + tenacity.wait_random(0, first),
            before_sleep=lambda state: _log.info("%s; trying again", state.outcome and state.outcome.exception()),
            reraise=True,
        )
        return retrying(action)

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """Turn the exceptions of a filesystem into FileNotFoundError, TemporaryError and FractalError."""
        where = f"{self.shown}/{name}"
        try:
            yield
        except FractalError:
            raise
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "does not exist", where) from error
        except Exception as error:  # whatever the libraries below a filesystem raise
            status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
            if isinstance(error, PermissionError) or status in (401, 403):
                raise FractalError(f"{where}: access denied; check credentials and permissions") from error
            if isinstance(status, int):
                kind = TemporaryError if status >= 500 or status in _AGAIN else FractalError
                raise kind(f"{where}: the server answers {status}") from error
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                advice = "name a file with its authority in SSL_CERT_FILE, for s3:// in AWS_CA_BUNDLE"
                raise FractalError(f"{where}: the certificate of the server is not trusted; {advice}") from error
            reason = one_line(str(error) or type(error).__name__).replace(" ssl:default", "")  # said of plain http, too
            if type(error).__name__ == "NoCredentialsError":  # botocore's; may pass on machines that get theirs late
                reason += "; set AWS_PROFILE, or for a public bucket FSSPEC_S3_ANON=true"
            raise TemporaryError(f"{where}: {redact(reason)[:300]}") from error


class LocalStore(Store):
    """A local folder. Its errors are those of the operating system, and not retried."""

    attempts = 1
    has_checksums = True
    chunk = _LOCAL_CHUNK

    def __init__(self, folder: Path) -> None:
        super().__init__(Location("file", str(folder)))
        self.folder = folder

    def _send(self, uploads: Sequence[Upload]) -> None:
        for upload in uploads:
            with upload.open() as content, atomic_file(self.folder / upload.name) as file:
                shutil.copyfileobj(content, file)

    def _info(self, path: str) -> FileInfo:
        return FileInfo(regular_size(Path(path)), "")

    def _open(self, path: str) -> io.FileIO:
        return _open_regular(Path(path))

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        yield


class WebStore(Store):
    """A folder on a web server, which can only be read. Proxies come from the environment."""

    def __init__(self, location: Location) -> None:
        import aiohttp

        client = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT, sock_read=_TIMEOUT),
            "headers": {"Accept-Encoding": "identity"},
            "read_bufsize": 1 << 20,
            "trust_env": True,
        }
        super().__init__(location, client_kwargs=client)

    def _open(self, path: str) -> Any:
        return self._files.open(path, "rb", block_size=0, size=1)  # streams; any size saves a request for it


class S3Store(Store):
    """A folder of a bucket. S3 receives the sha256 with the bytes, and refuses bytes that do not match."""

    has_checksums = True

    def _info(self, path: str) -> FileInfo:
        bucket, key, _ = self._files.split_path(path)
        head = self._files.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
        checksum = head.get("ChecksumSHA256", "")
        whole = "-" not in checksum  # otherwise it is one of parts
        return FileInfo(int(head["ContentLength"]), base64.b64decode(checksum).hex() if whole else "")

    def _send(self, uploads: Sequence[Upload]) -> None:
        for upload in uploads:
            if upload.info.size > _SINGLE_PUT:
                super()._send([upload])
                continue
            bucket, key, _ = self._files.split_path(self.location.file(upload.name))
            sha256 = base64.b64encode(bytes.fromhex(upload.info.sha256)).decode()
            checksum = {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": sha256}
            with upload.open() as body:  # streamed; put_file would hold all of it in memory
                self._files.call_s3("put_object", Bucket=bucket, Key=key, Body=body, **checksum)


class HubStore(Store):
    """A dataset repository on Hugging Face, or a folder in it. Each ``put`` is one commit; one is made at a time."""

    has_checksums = True  # of large files; small ones are read
    batch_size = 32  # commits per hour are limited

    def __init__(self, location: Location) -> None:
        super().__init__(location)
        _, user, place, *folders = location.root.split("/")
        name, _, revision = place.partition("@")
        repository = {"repo_id": f"{user}/{name}", "revision": unquote(revision) or None}
        self._repository: dict[str, Any] = {"repo_type": "dataset", **repository}
        self._folders = folders
        self._turn = threading.Lock()
        self.needs_card = not folders  # the hub does not look for it elsewhere

    def _send(self, uploads: Sequence[Upload]) -> None:
        from huggingface_hub import CommitOperationAdd, HfApi

        message = f"Add {uploads[0].name}" + (f" and {len(uploads) - 1} more files" if uploads[1:] else "")
        with self._turn:
            operations = [CommitOperationAdd("/".join([*self._folders, one.name]), one.content) for one in uploads]
            HfApi().create_commit(operations=operations, commit_message=message, **self._repository)


def open_store(url: str) -> Store:
    """Return the folder at a path or URL, without a request; raises FractalError if a package for it is missing."""
    location = parse_location(url)
    if location.scheme == "file":
        return LocalStore(Path(location.root))
    stores: dict[str, type[Store]] = {"http": WebStore, "s3": S3Store, "hf": HubStore}
    return stores.get(location.scheme, Store)(location)


def _open_regular(path: Path) -> io.FileIO:
    regular_size(path)
    return path.open("rb", buffering=0)
