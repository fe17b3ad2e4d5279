"""Bounded reading of untrusted files, typed JSON, atomic writing, and the folder of caches.

Only regular files are opened: reading a pipe may block, and a device may never end. Functions raise a ``FractalError``
that names the file if it is not what it should be, and ``OSError`` if it cannot be read.
"""

import errno
import getpass
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, TypeVar

import msgspec

from fractalshards.errors import FractalError
from fractalshards.human import human_bytes


def regular_size(path: Path) -> int:
    """Return the size of a regular file in bytes; symbolic links are followed."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FractalError(f"{path}: not a regular file; do not use this dataset")
    return status.st_size


def read_bounded(path: Path, most: int) -> bytes:
    """Read a regular file of at most ``most`` bytes."""
    if regular_size(path) <= most:
        with path.open("rb") as file:
            if len(data := file.read(most + 1)) <= most:  # it may have grown, and some files report no size
                return data
    raise FractalError(f"{path}: larger than {most >> 20} MiB, not a file of this format; fetch or build it again")


MAX_JSON_BYTES = 16 << 20  # a parsed empty list takes 24 times its text
_MAX_DEPTH = 32
_MAX_COMMAS = 4_000_000  # "0.0," is the shortest element of a long list
_NOT_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[^][{}"]++', re.DOTALL)
_T = TypeVar("_T")


def read_json(path: Path, kind: type[_T]) -> _T:
    """Read a JSON file of at most 16 MiB as a typed value, such as a msgspec Struct, a dataclass or a mapping."""
    return parse_json(read_bounded(path, MAX_JSON_BYTES), kind, str(path))


def parse_json(data: bytes, kind: type[_T], where: str) -> _T:
    """Parse JSON that came from ``where``, nested at most 32 deep and with at most four million commas."""
    advice = "the file is damaged or not of this format, fetch or build it again"
    if data.count(b",") > _MAX_COMMAS or _is_deep(data):
        raise FractalError(f"{where}: too many values, or nested too deeply; {advice}")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise FractalError(f"{where}: {error}; {advice}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FractalError(f"{where}: not valid JSON ({error}); {advice}") from error


def _is_deep(text: bytes) -> bool:
    """Return whether lists and objects of a JSON text are nested too deeply."""
    steps = (1 if bracket in b"[{" else -1 for bracket in _NOT_BRACKETS.sub(b"", text))
    return any(depth > _MAX_DEPTH for depth in accumulate(steps))


TEMPORARY = ".tmp~"  # prefix of unfinished files
_STALE_SECONDS = 3600.0
_MOST_NAME_BYTES = 100  # of the file's name at the end of the temporary one; names have at most 255
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # raised by file systems without hard links


@contextmanager
def atomic_file(path: Path, exclusive: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` for writing; on success it becomes ``path``, on failure it is removed.

    The temporary name contains host and process, so writers never share one, and ``remove_leftovers`` knows the writer.
    With ``exclusive`` it raises FileExistsError if ``path`` exists by then.
    """
    writer = f"{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex[:8]}.{_pid_namespace()}"
    name = os.fsdecode(os.fsencode(path.name)[-_MOST_NAME_BYTES:])
    temporary = path.with_name(f"{TEMPORARY}{writer}~{name}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            _rename_new(temporary, path)
        else:
            temporary.replace(path)
    except BaseException as error:
        with suppress(OSError):  # the first error counts
            temporary.unlink()
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # a full disk names no file, and users do not know the temporary one
        raise
    _fsync_folder(path.parent)


def _rename_new(temporary: Path, path: Path) -> None:
    """Rename a file unless the name is taken; without hard links, as on exFAT or SMB, this is checked first."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        temporary.replace(path)
    else:
        temporary.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically, make its parent folders, and remove leftovers beside it; see ``atomic_file``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    with atomic_file(path) as file:
        file.write(data)


def write_json(path: Path, data: Mapping[str, object], indent: int | None = None, exclusive: bool = False) -> None:
    """Write a mapping as JSON atomically; see ``atomic_file``."""
    with atomic_file(path, exclusive) as file:
        file.write(json.dumps(data, indent=indent).encode() + b"\n")


_LIBRARIES = {"MPLCONFIGDIR": "matplotlib", "HF_HOME": "huggingface", "TORCH_HOME": "torch"}


def private_cache(scratch: bool = False) -> Path | None:
    """Return the folder of all caches of this project, or None where there is no place for one.

    It is ``fractalpretrain`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; in a container whose user has no writable home,
    ``$TMPDIR/fractalpretrain-UID``. With ``scratch``, for large files, ``$TMPDIR`` comes first if it is set, as batch
    systems do. It is created, and must belong to the user alone, since caches hold code: raises FractalError if others
    can write there.
    """
    kept = _home_caches() / "fractalpretrain"
    temporary = Path(os.environ.get("TMPDIR") or "/tmp") / f"fractalpretrain-{os.getuid()}"
    for folder in (temporary, kept) if scratch and os.environ.get("TMPDIR") else (kept, temporary):
        with suppress(OSError):
            if folder.is_absolute() and _is_private(folder):  # not "~/.cache" of a user without a home
                return folder
    return None


def provide_home() -> None:
    """Point libraries that keep files in the home folder to ``private_cache`` if there is no writable home.

    Also gives users without an account a name. Commands call it first; it holds for all processes that they start.
    """
    home = _home_caches()
    existing = next((path for path in (home, *home.parents) if os.path.exists(path)), home)
    if not (home.is_absolute() and os.access(existing, os.W_OK | os.X_OK)):
        with suppress(FractalError):
            if folder := private_cache():
                for variable, name in _LIBRARIES.items():
                    os.environ.setdefault(variable, str(folder / name))
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"


def _home_caches() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))


def _is_private(folder: Path) -> bool:
    """Create a folder, not a link, that only this user may enter; return whether it can be written."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        return False
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise FractalError(f"{folder}: other users can write there; set another TMPDIR or --cache-dir")
    return True


def check_space(folder: Path, wanted: float, advice: str) -> None:
    """Raise FractalError if the disk of a folder, which may not exist yet, has less than ``wanted`` bytes free."""
    total, _, free = shutil.disk_usage(_existing(folder))
    if total and wanted > free:
        sizes = f"needs {human_bytes(wanted)}, the disk has {human_bytes(free)} free"
        raise FractalError(f"{folder}: {sizes}; free some space, {advice}")


def check_writable(folder: Path) -> None:
    """Raise OSError if no file can be created in a folder, which may not exist yet: before long work."""
    try:
        tempfile.TemporaryFile(dir=_existing(folder)).close()
    except OSError as error:
        error.filename = str(folder)
        raise


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files whose writer is gone: on this host if its process has ended, else after an hour."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if _abandoned(path):
            with suppress(OSError):  # removed by another process, or belongs to another user, as in /tmp
                path.unlink()


def _abandoned(path: Path) -> bool:
    host, process, unique, *_ = [*path.name.removeprefix(TEMPORARY).split("~"), "", ""]
    if host == socket.gethostname() and unique.partition(".")[2] in ("", _pid_namespace()):
        return not _is_running(process)
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:  # has the time of the file server, not of this machine
            return os.fstat(probe.fileno()).st_mtime - path.stat().st_mtime > _STALE_SECONDS
    except OSError:
        return False


def _is_running(process: str) -> bool:
    """Return whether a process exists and has not ended; /proc may hide those of other users."""
    try:
        os.kill(int(process), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    with suppress(OSError):  # in a container nobody may reap what has ended
        return not Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].startswith(" Z")
    return True


def _pid_namespace() -> str:
    """Return an id that tells apart containers with the same host name; empty if unknown."""
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return ""


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # some network file systems cannot
            error.filename = str(folder)
            raise
    finally:
        os.close(descriptor)
