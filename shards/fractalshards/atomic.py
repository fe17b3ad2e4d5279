"""Files that are visible only when they are whole: write beside, fsync, rename, fsync the folder."""

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_PREFIX = ".tmp~"
_STALE_SECONDS = 3600.0


@contextmanager
def atomic_file(path: Path, exclusive: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` for writing; on success it becomes ``path``, on failure it is removed.

    The temporary name holds host and process, so writers never share one and leftovers can be told apart.

    Raises:
        FileExistsError: if ``exclusive`` and ``path`` is there already, perhaps since a moment ago.
        OSError: as the file system does (full disk, no permission).
    """
    writer = f"{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex[:8]}"
    temporary = path.with_name(f"{_PREFIX}{writer}~{path.name}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            os.link(temporary, path)
            temporary.unlink()
        else:
            temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # the error that led here is the one to tell
            temporary.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # a full disk names no file, and the temporary one tells the user nothing
        raise
    _fsync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, atomically, and the folders that it lies in; see ``atomic_file``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: Path, data: Mapping[str, object], indent: int | None = None, exclusive: bool = False) -> None:
    """Write a mapping as JSON, atomically; see ``atomic_file``."""
    with atomic_file(path, exclusive) as file:
        file.write(json.dumps(data, indent=indent).encode() + b"\n")


def remove_leftovers(folder: Path) -> int:
    """Remove temporary files whose writer is gone; return how many.

    A writer on this host is gone when its process is; of other hosts only files untouched for an hour are taken.
    """
    removed = 0
    for path in folder.glob(f"{_PREFIX}*"):
        if _abandoned(path):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _abandoned(path: Path) -> bool:
    host, process, *_ = [*path.name.removeprefix(_PREFIX).split("~"), ""]
    if host == socket.gethostname():
        return not Path(f"/proc/{process}").exists()
    try:
        return time.time() - path.stat().st_mtime > _STALE_SECONDS
    except FileNotFoundError:
        return False


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
