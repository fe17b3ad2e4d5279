"""Where datasets lie: local folders and URLs, which of them are taken, and how they are shown. Pure functions."""

import base64
import errno
import hashlib
import importlib
import re
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError, UsageError, needs_package
from fractalshards.human import one_line
from fractalshards.storage import regular_size

Scheme = Literal["file", "http", "s3", "gs", "hf"]

_SCHEMES: dict[str, Scheme] = {
    "file": "file", "http": "http", "https": "http", "s3": "s3", "gs": "gs", "gcs": "gs", "hf": "hf",
}  # fmt: skip
_KNOWN = "a local folder, s3://, gs://, hf://datasets/, http:// or https://"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_SECRETS = ((re.compile(r"//[^/@\s]*@"), "//***@"), (re.compile(r"(://[^\s'\"<>)?]*)\?[^\s'\"<>),]*"), r"\1?***"))


@dataclass(frozen=True)
class Location:
    """A folder somewhere.

    Attributes:
        scheme: decides how it is reached.
        root: as the store wants it: a path, ``bucket/key``, or for http a URL without its query.
        query: of an http URL, goes behind every file's name: signatures and tokens stand there.
        shown: the URL without credentials, for messages.
    """

    scheme: Scheme
    root: str
    query: str
    shown: str

    def file(self, name: str) -> str:
        """A file of the folder, as the store wants it."""
        path = f"{self.root}/{name}"
        return f"{path}?{self.query}" if self.query else path


def parse_location(text: str) -> Location:
    """Read a local path or a URL of a folder.

    Only schemes that fetch bytes are taken: fsspec would also chain URLs (``simplecache::``), and open archives and
    references that name further files.

    Raises:
        UsageError: for any other scheme, or a URL that names no folder.
    """
    shown = redact(text)
    if "::" in text:
        raise UsageError(f"{shown}: chained URLs are not taken; give {_KNOWN}")
    match = _SCHEME.match(text)
    if match is None:
        if not text:
            raise UsageError(f"an empty URL; give {_KNOWN}")
        return Location("file", str(Path(text)), "", str(Path(text)))
    scheme = _SCHEMES.get(match[1].lower())
    if scheme is None or not text[match.end() :].startswith("//"):
        raise UsageError(f"{shown}: not a kind of URL that is taken; give {_KNOWN}")
    rest = text[match.end() + 2 :].rstrip("/")
    if scheme == "http":
        return _parse_http(text, shown)
    if scheme == "file":
        if not rest.startswith("/"):
            raise UsageError(f"{shown}: a file URL has three slashes and a whole path, file:///data/set")
        return Location(scheme, rest, "", rest)
    if "@" in rest.split("/")[0]:
        raise UsageError(f"{shown}: credentials do not belong into a URL; give them as the store's own tools take them")
    if not rest or rest.startswith("/") or (scheme == "hf" and not re.match(r"datasets/[^/]+/[^/]+", rest)):
        example = "hf://datasets/USER/NAME" if scheme == "hf" else f"{scheme}://BUCKET/FOLDER"
        raise UsageError(f"{shown}: names no folder; write {example}")
    return Location(scheme, rest, "", shown.rstrip("/"))


def redact(text: str) -> str:
    """Text in which URLs have lost what may be secret: user and password, and the query."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def _parse_http(text: str, shown: str) -> Location:
    try:
        parts = urlsplit(text)
        named = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is no number, an IPv6 address without its bracket
        named = False
    if not named or parts.fragment:
        raise UsageError(f"{shown}: not the URL of a folder; write https://HOST/FOLDER")
    path = quote(parts.path.rstrip("/"), safe="/%~!$&'()*+,;=:@")
    root = urlunsplit((parts.scheme.lower(), parts.netloc, path, "", ""))
    return Location("http", root, quote(parts.query, safe="%/?:@!$&'()*+,;=~"), redact(root))


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


_STREAM = 1 << 20  # each piece is a turn of another thread
_TIMEOUT = 30.0


class HttpSource:
    """See ``Source``."""

    steady = False

    def __init__(self, location: Location) -> None:
        with needs_package("http://", "aiohttp", "pip install aiohttp"):
            from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=_TIMEOUT, sock_read=_TIMEOUT)
        # proxies come from the environment; the URL is quoted already, and a signature would not survive a second time
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}, "encoded": True}
        self._location = location
        self._files = make_filesystem("http", options)

    def chunks(self, name: str, start: int) -> Generator[bytes | memoryview]:
        """See ``Source``."""
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


_BLOCK = 8 << 20  # of an object store, where every block is a request


def make_filesystem(scheme: str, options: dict[str, Any]) -> Any:
    """A filesystem of its own: instances that are shared keep what they listed.

    Raises:
        ImportError: if its package is not installed.
    """
    make: Callable[..., Any] = importlib.import_module("fsspec").filesystem
    return make(scheme, skip_instance_cache=True, **options)


def find_info(files: Any, path: str) -> Any | None:
    """What a filesystem says of a file now; None if it is not there. Raises StoreError."""

    def ask() -> Any:
        files.invalidate_cache(path)
        return files.info(path)

    return if_there(ask)


def read_blocks(files: Any, path: str, start: int) -> Generator[bytes | memoryview]:
    """Bytes of an object from ``start`` on, in large blocks; raises StoreError."""
    with translated(), files.open(path, "rb", block_size=_BLOCK, cache_type="none") as file:
        file.seek(start)
        while chunk := file.read(_BLOCK):
            yield chunk


_SINGLE_PUT = 5 * 2**30  # what S3 takes in one request
_INSTALL = {"s3": ("s3fs", "pip install '.[s3]' in a clone of the project"), "gs": ("gcsfs", "pip install gcsfs")}
_NONE_YET = {"IfNoneMatch": "*"}


class S3Store:
    """See ``Store``. S3 is told the sha256 of what is sent and refuses anything else."""

    steady = False
    tells = True
    together = 1
    wants_card = False

    def __init__(self, location: Location) -> None:
        self._location = location
        # ``Remote`` tries again
        options = {"use_listings_cache": False, "config_kwargs": {"retries": {"total_max_attempts": 1}}}
        self._files = _open(location, options)
        self._files.retries = 1

    def prepare(self) -> None:
        """Nothing needs doing."""

    def chunks(self, name: str, start: int) -> Generator[bytes | memoryview]:
        """See ``Source``."""
        return read_blocks(self._files, self._location.file(name), start)

    def told(self, name: str) -> Told | None:
        """See ``Store``."""
        head = self._head(name)
        if head is None:
            return None
        checksum = head.get("ChecksumSHA256", "")
        whole = checksum and "-" not in checksum  # otherwise it is one of parts
        return Told(int(head["ContentLength"]), base64.b64decode(checksum).hex() if whole else None)

    def put(self, uploads: Sequence[Upload], advance: Advance) -> None:
        """See ``Store``."""
        for upload in uploads:
            upload.check()
            self._put(upload, {})
            check_arrived(self, upload)
        advance(sum(upload.told.size for upload in uploads))

    def update(self, name: str, most: int, change: Change) -> None:
        """See ``Store``: S3 refuses to overwrite what is not there any more; a store that cannot do so overwrites."""
        head = self._head(name)
        before = read_small(self, name, most)
        if (after := change(before)) != before:
            upload = Upload.of_bytes(name, after)
            self._put(upload, {"IfMatch": head["ETag"]} if head else _NONE_YET)
            check_arrived(self, upload)

    def _put(self, upload: Upload, condition: dict[str, str]) -> None:
        target, content = self._location.file(upload.name), upload.content
        with translated(content):
            if not isinstance(content, bytes) and upload.told.size > _SINGLE_PUT:
                self._files.put_file(str(content), target)
            elif isinstance(content, bytes):
                try:
                    self._send(upload, content, condition)
                except OSError as error:
                    if error.errno != errno.ENOSYS:
                        raise
                    self._send(upload, content, {})
            else:
                with content.open("rb") as file:
                    self._send(upload, file, condition)

    def _send(self, upload: Upload, body: Any, condition: dict[str, str]) -> None:
        bucket, key, _ = self._files.split_path(self._location.file(upload.name))
        sha256 = base64.b64encode(bytes.fromhex(upload.told.sha256 or "")).decode()
        checksum = {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": sha256}
        self._files.call_s3("put_object", Bucket=bucket, Key=key, Body=body, **checksum, **condition)

    def _head(self, name: str) -> dict[str, Any] | None:
        bucket, key, _ = self._files.split_path(self._location.file(name))
        return if_there(lambda: self._files.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED"))


class GoogleStore:
    """See ``Store``. What is sent is read back."""

    steady = False
    tells = False
    together = 1
    wants_card = False

    def __init__(self, location: Location) -> None:
        self._location = location
        self._files = _open(location, {"use_listings_cache": False})

    def prepare(self) -> None:
        """Nothing needs doing."""

    def chunks(self, name: str, start: int) -> Generator[bytes | memoryview]:
        """See ``Source``."""
        return read_blocks(self._files, self._location.file(name), start)

    def told(self, name: str) -> Told | None:
        """See ``Store``."""
        info = find_info(self._files, self._location.file(name))
        return info and Told(int(info["size"]), None)

    def put(self, uploads: Sequence[Upload], advance: Advance) -> None:
        """See ``Store``."""
        for upload in uploads:
            upload.check()
            target, content = self._location.file(upload.name), upload.content
            with translated(content):
                if isinstance(content, bytes):
                    self._files.pipe_file(target, content)
                else:
                    self._files.put_file(str(content), target)
            check_arrived(self, upload)
        advance(sum(upload.told.size for upload in uploads))

    def update(self, name: str, most: int, change: Change) -> None:
        """See ``Store``; but what is written between reading and writing is lost."""
        before = read_small(self, name, most)
        if (after := change(before)) != before:
            self.put([Upload.of_bytes(name, after)], lambda count: None)


def _open(location: Location, options: dict[str, Any]) -> Any:
    package, command = _INSTALL[location.scheme]
    with needs_package(f"{location.scheme}://", package, command), translated():
        return make_filesystem(location.scheme, options)


CARD = "README.md"
_TOGETHER = 32
_ROOT = re.compile(r"datasets/([^/]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?")


class HubStore:
    """See ``Store``."""

    steady = False
    tells = True
    together = _TOGETHER

    def __init__(self, location: Location) -> None:
        install = "pip install '.[hub]' in a clone of the project"
        with needs_package("hf://", "huggingface_hub", install), translated():
            self._files = make_filesystem("hf", {"use_listings_cache": False})
            from huggingface_hub import HfApi

        match = _ROOT.fullmatch(location.root)
        if match is None:
            raise StoreError("names no dataset; write hf://datasets/USER/NAME")
        self._location = location
        self._api = HfApi()
        self._turn = threading.Lock()
        self._folder = f"{match[3]}/" if match[3] else ""
        revision = unquote(match[2]) if match[2] else None
        self._repository: dict[str, Any] = {"repo_id": match[1], "repo_type": "dataset", "revision": revision}
        self.wants_card = not self._folder  # elsewhere the hub does not look for it

    def prepare(self) -> None:
        """Nothing needs doing."""

    def chunks(self, name: str, start: int) -> Generator[bytes | memoryview]:
        """See ``Source``."""
        return read_blocks(self._files, self._location.file(name), start)

    def told(self, name: str) -> Told | None:
        """See ``Store``. The hub knows the sha256 of large files."""
        info = find_info(self._files, self._location.file(name))
        return info and Told(int(info["size"]), (info.get("lfs") or {}).get("sha256"))

    def put(self, uploads: Sequence[Upload], advance: Advance) -> None:
        """See ``Store``. All come with one commit."""
        self._commit(uploads, None)
        advance(sum(upload.told.size for upload in uploads))

    def update(self, name: str, most: int, change: Change) -> None:
        """See ``Store``: the hub refuses a commit upon one that is not the newest."""
        with translated():
            newest = self._api.repo_info(**self._repository).sha
        before = read_small(self, name, most)
        if (after := change(before)) != before:
            self._commit([Upload.of_bytes(name, after)], newest)

    def _commit(self, uploads: Sequence[Upload], newest: str | None) -> None:
        from huggingface_hub import CommitOperationAdd

        for upload in uploads:
            upload.check()
        message = f"Add {uploads[0].name}" + (f" and {len(uploads) - 1} more files" if uploads[1:] else "")
        with self._turn, translated():
            files = [CommitOperationAdd(f"{self._folder}{upload.name}", upload.content) for upload in uploads]
            self._api.create_commit(operations=files, commit_message=message, parent_commit=newest, **self._repository)
        for upload in uploads:
            check_arrived(self, upload)


def dataset_card(before: bytes | None, splits: Collection[str]) -> bytes:
    """A ``README.md`` by which ``load_dataset`` and the hub's viewer take the tars, and not the sidecars, for data.

    One that was there ``before`` stays, unless it is ours of fewer splits.
    """
    if before is not None and before not in map(_card, (("train",), ("val",))):
        return before
    return _card(sorted(splits))


def _card(splits: Collection[str]) -> bytes:
    files = "".join(f'  - {{split: {name}, path: "{name}-*.tar"}}\n' for name in splits)
    head = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n\n"
    text = "WebDataset shards made with fractalpretrain; `fractalshards pull` fetches and checks them.\n"
    return f"{head}{text}".encode()
