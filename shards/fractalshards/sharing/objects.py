"""A folder of an object store, S3 or Google Cloud Storage."""

import base64
import errno
from collections.abc import Generator, Sequence
from typing import Any

from fractalshards.extras import needs_package
from fractalshards.sharing.filesystems import find_info, make_filesystem, read_blocks
from fractalshards.sharing.stores import (
    Advance,
    Change,
    Told,
    Upload,
    check_arrived,
    if_there,
    read_small,
    translated,
)
from fractalshards.sharing.urls import Location

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
