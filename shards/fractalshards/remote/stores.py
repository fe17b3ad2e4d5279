"""Read and write the files of one folder: local, on a web server, S3, Google Cloud Storage or Hugging Face."""

import base64
import errno
import hashlib
import inspect
import io
import re
import ssl
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import quote, unquote

from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError, UsageError, needs_package
from fractalshards.human import one_line
from fractalshards.storage import atomic_file, regular_size, remove_leftovers

README = "README.md"

_ROOTS = {
    scheme: re.compile(pattern, re.IGNORECASE)
    for scheme, pattern in (
        ("file", r"file://(/[^/].*)"),
        ("http", r"(https?://(?:[^/?#@]*@)?(?:[^][/?#@:]+|\[[\da-f:]+\])(?::\d{1,5})?(?:/[^?#]*)?)(?:\?([^#]*))?"),
        ("s3", r"s3://([^/@]+(?:/.*)?)"),
        ("gs", r"gc?s://([^/@]+(?:/.*)?)"),
        ("hf", r"hf://(datasets/[^/@]+/[^/@]+(?:@[^/]+)?(?:/.*)?)"),
    )
}
_UNQUOTED = "/%~!$&'()*+,;=:@[]?"  # characters that stay as they are in a URL
_HUB_ROOT = re.compile(r"datasets/([^/]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?")
_SECRETS = ((re.compile(r"//[^/@\s]*@"), "//***@"), (re.compile(r"(://[^\s'\"<>)?]*)\?[^\s'\"<>),]*"), r"\1?***"))


@dataclass(frozen=True)
class Location:
    """A folder at a path or URL.

    Attributes:
        scheme: file, http, s3, gs or hf.
        root: a path, ``bucket/key``, ``datasets/USER/NAME[@REVISION][/FOLDER]``, or an http URL without its query.
        query: query of an http URL (a signature or token), appended to the URL of every file.
        shown: the path or URL without credentials, for messages.
    """

    scheme: str
    root: str
    query: str
    shown: str

    def file(self, name: str) -> str:
        """Path or URL of a file in the folder."""
        return f"{self.root}/{name}" + (f"?{self.query}" if self.query else "")


def parse_location(text: str) -> Location:
    """Parse a local path or the URL of a folder.

    Only schemes that fetch plain bytes are accepted: fsspec would also chain URLs (``simplecache::``) and open
    archives and references that name further files.

    Raises:
        UsageError: for any other scheme, or a URL that names no folder.
    """
    if text and not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", text):
        return Location("file", str(Path(text)), "", str(Path(text)))
    for scheme, pattern in _ROOTS.items():
        if match := pattern.fullmatch(text):
            root, query = match[1].rstrip("/"), ""
            if scheme == "http":
                protocol, _, rest = root.partition(":")
                root = f"{protocol.lower()}:{quote(rest, safe=_UNQUOTED)}"
                query = quote(match[2] or "", safe=_UNQUOTED)
            shown = root if scheme == "file" else redact(text.partition("?")[0].rstrip("/"))
            return Location(scheme, root, query, shown)
    raise UsageError(
        f"{redact(text)}: not a folder or supported URL; give a local path, s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, "
        "hf://datasets/USER/NAME or https://HOST/FOLDER, and credentials of object stores as their own tools expect"
    )


def redact(text: str) -> str:
    """Text with the secrets of its URLs replaced by ``***``: user and password, and the query."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


_CHUNK = 1 << 20
_LOCAL_CHUNK = 1 << 18  # stays in a core's cache from reading to hashing and writing
_BLOCK = 8 << 20  # of an object store, where every read is a request
_SINGLE_PUT = 5 * 2**30  # bytes that S3 takes in one request
_TIMEOUT = 30.0  # seconds
_RETRY_SECONDS = (0.5, 30.0)  # before the first retry, doubled before each further one, and the longest
_AGAIN = (408, 409, 412, 425, 429)  # HTTP statuses below 500 that may succeed later
_PACKAGES = {
    "http": ("aiohttp", "pip install aiohttp"),
    "s3": ("s3fs", "pip install '.[s3]' in a clone of the project"),
    "gs": ("gcsfs", "pip install gcsfs"),
    "hf": ("huggingface_hub", "pip install '.[hub]' in a clone of the project"),
}
_T = TypeVar("_T")


class StoreError(FractalError):
    """A store or the network failed; ``transient`` if trying again may help."""

    def __init__(self, message: str, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


@dataclass(frozen=True)
class FileInfo:
    """Size of a file in bytes, and its sha256; empty where a store does not know it."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Upload:
    """A file to store, and the size and sha256 that it must have."""

    name: str
    content: Path | bytes
    info: FileInfo

    @classmethod
    def of_bytes(cls, name: str, data: bytes) -> "Upload":
        """Content from memory."""
        return cls(name, data, FileInfo(len(data), hashlib.sha256(data).hexdigest()))

    def chunks(self) -> Iterator[bytes]:
        """Yield the content, and at most a chunk more than its size.

        Raises:
            FractalError: at the end, if size or sha256 differ.
            OSError: if it cannot be read.
        """
        digest, size = hashlib.sha256(), 0
        with io.BytesIO(self.content) if isinstance(self.content, bytes) else _open_regular(self.content) as file:
            while size <= self.info.size and (chunk := file.read(_LOCAL_CHUNK)):
                digest.update(chunk)
                size += len(chunk)
                yield chunk
        if FileInfo(size, digest.hexdigest()) != self.info:
            where = self.content if isinstance(self.content, Path) else self.name
            raise FractalError(f"{where}: not what the manifest says; run 'fractalshards verify' on its folder")


class RemoteReader:
    """Files of one folder, read through fsspec. Safe to use from many threads, but not after a fork.

    Failures that may pass are retried: ``attempts`` in all, which take about a minute. Methods raise
    FileNotFoundError if a file is not there, and FractalError, without the secrets of a URL, for other failures.
    """

    attempts = 6  # the filesystems of object stores retry, too
    _transient: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, location: Location, files: Any, **open_options: Any) -> None:
        self.location, self.shown = location, location.shown
        self._files = files
        self._open_options = open_options or {"block_size": _BLOCK, "cache_type": "none"}
        self._chunk = self._open_options["block_size"] or _CHUNK
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Cut off the requests that other threads are waiting for. The reader cannot be used any more."""
        import asyncio

        from fsspec.asyn import get_loop

        def cancel_requests() -> None:
            for task in asyncio.all_tasks(loop):
                if inspect.getcoroutinestate(cast(Any, task.get_coro())) == inspect.CORO_SUSPENDED:
                    task.cancel()  # before its first step, it would leave the thread waiting forever

        self._cancelled.set()
        loop = get_loop()
        loop.call_soon_threadsafe(cancel_requests)

    def read(self, name: str, most: int, attempts: int | None = None) -> bytes | None:
        """Contents of a file of at most ``most`` bytes; None if it is not there."""
        data = bytearray()

        def copy() -> None:
            data.clear()
            self._copy(name, data.extend, most + 1)

        try:
            self._persist(copy, attempts)
        except FileNotFoundError:
            return None
        if len(data) > most:
            raise FractalError(f"{self.shown}/{name}: larger than {most >> 20} MiB; do not use it")
        return bytes(data)

    def fetch(self, name: str, file: BinaryIO, info: FileInfo) -> None:
        """Write the first ``info.size`` bytes of a remote file to ``file``, from its beginning, and check them."""

        def copy() -> None:
            file.seek(0)
            found = self._copy(name, file.write, info.size)
            if found != info:
                what = "sha256 differs" if found.size == info.size else f"ends after {found.size:,} bytes"
                text = f"damaged ({what}), not what the manifest says; it must be pushed again"
                raise StoreError(f"{self.shown}/{name}: {text}", transient=True)

        self._persist(copy)

    def _copy(self, name: str, write: Callable[[bytes], object], most: int) -> FileInfo:
        """Pass the first ``most`` bytes of a file to ``write``; return their number and sha256."""
        digest, size = hashlib.sha256(), 0
        with closing(self._chunks(name)) as chunks:  # errors of ``write`` are not those of the store
            while size < most and (chunk := next(chunks, b"")[: most - size]):
                write(chunk)
                digest.update(chunk)
                size += len(chunk)
        return FileInfo(size, digest.hexdigest())

    def _chunks(self, name: str) -> Generator[bytes]:
        with self._translated(name), self._open(self.location.file(name)) as file:
            while not self._cancelled.is_set() and (chunk := file.read(self._chunk)):
                yield chunk
            if self._cancelled.is_set():
                raise StoreError(f"{self.shown}/{name}: cancelled")

    def _open(self, path: str) -> Any:
        return self._files.open(path, "rb", **self._open_options)

    def _persist(self, action: Callable[[], _T], attempts: int | None = None) -> _T:
        """Run an action until it succeeds, fails for good, or has failed ``attempts`` times."""
        import tenacity  # slow to import

        first, longest = _RETRY_SECONDS
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, StoreError) and error.transient),
            stop=tenacity.stop_after_attempt(attempts or self.attempts) | tenacity.stop_when_event_set(self._cancelled),
            wait=tenacity.wait_exponential(first, longest) + tenacity.wait_random(0, first),
            sleep=tenacity.sleep_using_event(self._cancelled),
            reraise=True,
        )
        return retrying(action)

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """Turn the exceptions of a filesystem into FileNotFoundError and StoreError; local ones stay OSErrors."""
        where = f"{self.shown}/{name}"
        try:
            yield
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "not there", where) from error
        except Exception as error:  # whatever the libraries below a filesystem raise
            if self.location.scheme == "file" or isinstance(error, FractalError):
                raise
            status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
            text = redact(one_line(str(error) or type(error).__name__))[:300]
            transient = isinstance(error, self._transient) and not isinstance(error, (ssl.SSLError, ValueError))
            if isinstance(error, PermissionError) or status in (401, 403):
                text, transient = "access denied; check credentials and permissions", False
            elif isinstance(status, int):
                text, transient = f"the server answers {status}", status >= 500 or status in _AGAIN
            raise StoreError(f"{where}: {text}", transient) from error


class HttpReader(RemoteReader):
    """Files of a web server. Proxies come from the environment."""

    attempts = 8

    def __init__(self, location: Location) -> None:
        import aiohttp

        self._transient = (OSError, aiohttp.ClientError)
        client = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT, sock_read=_TIMEOUT),
            "headers": {"Accept-Encoding": "identity"},
            "read_bufsize": _CHUNK,
            "trust_env": True,
        }
        # The URL is quoted already, and quoting it again would break a signature. A block size of 0 streams, and any
        # size saves a request for it.
        super().__init__(location, _filesystem("http", client_kwargs=client, encoded=True), block_size=0, size=1)


class Store(RemoteReader):
    """A folder that can be written to: here, on any filesystem; what is sent is read back.

    Attributes:
        has_checksums: ``holds`` compares sha256, not sizes alone.
        batch_size: how many shards one ``put`` should take.
        needs_readme: a ``README.md`` tells readers how to load the dataset.
    """

    has_checksums = False
    batch_size = 1
    needs_readme = False

    def __init__(self, location: Location) -> None:
        local = location.scheme == "file"
        super().__init__(location, None if local else _filesystem(location.scheme, use_listings_cache=False))

    def prepare(self) -> None:
        """Make the folder ready for writing."""

    def holds(self, upload: Upload) -> bool:
        """Whether a file is stored already."""
        found = self._persist(lambda: self._stored(upload, read_back=self.has_checksums))
        return found in (upload.info, FileInfo(upload.info.size, ""))

    def put(self, uploads: Sequence[Upload]) -> None:
        """Store files in this order, each visible only when it is whole, and check what arrived.

        Raises:
            FractalError: also if a local file has another size or sha256 than it must have.
            OSError: if a local file cannot be read.
        """

        def send() -> None:
            with self._translated(uploads[0].name):
                self._send(uploads)
            for upload in uploads:
                if self._stored(upload, read_back=True) != upload.info:
                    raise StoreError(f"{self.shown}/{upload.name}: arrived damaged", transient=True)

        for upload in uploads:
            deque(upload.chunks(), maxlen=0)  # checks them
        self._persist(send)

    def _stored(self, upload: Upload, read_back: bool) -> FileInfo | None:
        """Size and sha256 of a file that is stored, or None; reads it if need be and ``read_back``."""
        try:
            with self._translated(upload.name):
                found = self._info(self.location.file(upload.name))
            if read_back and not found.sha256 and found.size == upload.info.size:
                return self._copy(upload.name, lambda chunk: None, found.size + 1)
            return found
        except FileNotFoundError:
            return None

    def _info(self, path: str) -> FileInfo:
        self._files.invalidate_cache(path)
        found = self._files.info(path)
        return FileInfo(int(found["size"]), (found.get("lfs") or {}).get("sha256", ""))

    def _send(self, uploads: Sequence[Upload]) -> None:
        for upload in uploads:
            path = self.location.file(upload.name)
            if isinstance(upload.content, bytes):
                self._files.pipe_file(path, upload.content)
            else:
                self._files.put_file(str(upload.content), path)


class LocalStore(Store):
    """A local folder."""

    has_checksums = True

    def __init__(self, folder: Path) -> None:
        super().__init__(Location("file", str(folder), "", str(folder)))
        self.folder = folder
        self.attempts = 1

    def cancel(self) -> None:
        """See ``RemoteReader.cancel``."""
        self._cancelled.set()

    def prepare(self) -> None:
        """Create the folder, and remove what killed writers left in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)

    def put(self, uploads: Sequence[Upload]) -> None:
        """See ``Store.put``; the bytes are checked as they are written."""
        for upload in uploads:
            with atomic_file(self.folder / upload.name) as file:
                file.writelines(upload.chunks())

    def _info(self, path: str) -> FileInfo:
        return FileInfo(regular_size(Path(path)), sha256_file(Path(path)))

    def _open(self, path: str) -> BinaryIO:
        return _open_regular(Path(path))


class S3Store(Store):
    """A folder of a bucket. S3 is sent the sha256 with the bytes, and refuses any others."""

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
            content = upload.content  # a file is streamed; put_file would hold all of it in memory
            with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as body:
                checksum = {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": sha256}
                self._files.call_s3("put_object", Bucket=bucket, Key=key, Body=body, **checksum)


class HubStore(Store):
    """A dataset repository on Hugging Face, or a folder in it. Each ``put`` is one commit; one is made at a time."""

    has_checksums = True  # of large files; small ones are read
    batch_size = 32  # commits per hour are limited

    def __init__(self, location: Location) -> None:
        super().__init__(location)
        name, revision, folder = cast(re.Match[str], _HUB_ROOT.fullmatch(location.root)).groups()
        revision = revision and unquote(revision)
        self._repository: dict[str, Any] = {"repo_id": name, "repo_type": "dataset", "revision": revision}
        self._folder = f"{folder}/" if folder else ""
        self._turn = threading.Lock()
        self.needs_readme = not folder  # the hub does not look for it elsewhere

    def _send(self, uploads: Sequence[Upload]) -> None:
        from huggingface_hub import CommitOperationAdd, HfApi

        message = f"Add {uploads[0].name}" + (f" and {len(uploads) - 1} more files" if uploads[1:] else "")
        with self._turn:
            operations = [CommitOperationAdd(f"{self._folder}{upload.name}", upload.content) for upload in uploads]
            HfApi().create_commit(operations=operations, commit_message=message, **self._repository)


def dataset_readme(splits: Collection[str]) -> bytes:
    """Return a ``README.md`` by which ``load_dataset`` and the hub's viewer read the tars, and not the sidecars."""
    files = "".join(f'  - {{split: {name}, path: "{name}-*.tar"}}\n' for name in sorted(splits))
    head = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n\n"
    text = "WebDataset shards made with fractalpretrain; `fractalshards pull` fetches and checks them.\n"
    return f"{head}{text}".encode()


def open_reader(url: str) -> RemoteReader:
    """Return a reader for the folder at a local path or a URL; nothing is requested yet.

    Raises:
        UsageError: for URLs that are not supported.
        FractalError: if a package is missing.
    """
    location = parse_location(url)
    return HttpReader(location) if location.scheme == "http" else open_store(url)


def open_store(url: str) -> Store:
    """Return the folder at a local path or a URL for writing; raises as ``open_reader`` does, and for web servers."""
    location = parse_location(url)
    if location.scheme == "http":
        raise UsageError(f"{location.shown}: web servers are read only; give a local folder, s3://, gs:// or hf://")
    if location.scheme == "file":
        return LocalStore(Path(location.root))
    return {"s3": S3Store, "hf": HubStore}.get(location.scheme, Store)(location)


def _filesystem(scheme: str, **options: Any) -> Any:
    """A filesystem of its own: shared instances keep listings."""
    import fsspec

    with needs_package(f"{scheme}://", *_PACKAGES[scheme]):
        return fsspec.filesystem(scheme, skip_instance_cache=True, **options)


def _open_regular(path: Path) -> BinaryIO:
    regular_size(path)
    return cast(BinaryIO, path.open("rb", buffering=0))
