"""The exceptions that users see: their message is a single line saying what, where and what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

_ADVICE = {
    errno.ENOSPC: "free some space or choose another folder, then run the same command again",
    errno.EDQUOT: "free some quota or choose another folder, then run the same command again",
    errno.EACCES: "choose a folder you may read and write",
    errno.EPERM: "choose a folder you may read and write",
    errno.EROFS: "choose a folder you may write",
    errno.ENOENT: "check the path, or that its file system is there",
    errno.EISDIR: "choose a file, not a folder",
    errno.ENOTDIR: "choose a path that is not a file",
    errno.EEXIST: "choose a path that is not a file",
    errno.EIO: "check the disk or the network file system, then run the same command again",
}


class FractalError(Exception):
    """Something failed in a way the user can act on; commands print it as one line and exit with 1."""


class UsageError(FractalError):
    """A value was asked for that makes no sense; commands exit with 2."""


class WorkerLostError(FractalError):
    """The process that worked on a task was killed, several times over."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came, as from a batch system; commands end as by Ctrl-C, but exit with 143."""


class StoppedError(FractalError):
    """Ctrl-C or SIGTERM came, and there is something to say of what was done by then; commands exit with ``code``."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def describe_os_error(error: OSError) -> str:
    """An operating system's error as one line: which file, what, and what to do."""
    where = f"{error.filename}: " if error.filename else ""
    advice = _ADVICE.get(error.errno or 0, "")
    return f"{where}{error.strerror or error}" + (f"; {advice}" if advice else "")


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Around imports of an optional extra of this distribution.

    Args:
        extra: its name in pyproject.toml.
        what: the thing that needs it, to begin a sentence with.

    Raises:
        FractalError: if a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise _missing(
            what, str(error.name).partition(".")[0], f"pip install '.[{extra}]' in a clone of the project"
        ) from error


@contextmanager
def needs_package(what: str, package: str, command: str) -> Iterator[None]:
    """Around what imports a package, perhaps deep inside another one that says so in its own words.

    Args:
        what: the thing that needs it, to begin a sentence with.
        command: installs it.

    Raises:
        FractalError: if it is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise _missing(what, package, command) from error


def _missing(what: str, package: str, command: str) -> FractalError:
    return FractalError(f"{what} needs {package}, which is not installed; run {command}")
