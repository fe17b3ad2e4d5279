"""The exceptions that users see: their message is one line that says what, where and what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

_ADVICE = {
    errno.ENOSPC: "free some space or choose another folder, then run the same command again",
    errno.EDQUOT: "free some quota or choose another folder, then run the same command again",
    errno.EACCES: "choose a folder you may read and write",
    errno.EROFS: "choose a folder you may write",
    errno.EMFILE: "lower --workers, or raise the limit of open files (ulimit -n)",
    errno.EAGAIN: "lower --workers, or raise the limit of processes (ulimit -u)",
    errno.ENOLCK: "choose a folder on a file system with locks",
    errno.EEXIST: "check the path: it leads to a file where a folder is needed",
    errno.ENOTDIR: "check the path: it leads to a file where a folder is needed",
    errno.EISDIR: "check the path: it leads to a folder where a file is needed",
    errno.ENOENT: "check the path, and that its file system is mounted",
}


class FractalError(Exception):
    """A failure that the user can act on; commands print it as one line and exit with 1."""


class UsageError(FractalError):
    """Wrong usage, such as an option out of range; commands exit with 2."""


class BadSampleError(FractalError):
    """A sample is damaged or its file cannot be read, while others may be readable."""


class WorkerLostError(FractalError):
    """A loader worker died, or the worker processes of a task three times."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived, e.g. from a batch system; commands end as on Ctrl-C, but exit with 143."""


class StoppedError(FractalError):
    """Ctrl-C or SIGTERM ended the work; the message says what was done, and commands exit with ``code``."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def describe_os_error(error: OSError) -> str:
    """Describe an error of the operating system in one line: which file, what, and what to do."""
    where = f"{error.filename}: " if error.filename else ""
    advice = _ADVICE.get(error.errno or 0, "")
    return f"{where}{error.strerror or error}" + (f"; {advice}" if advice else "")


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Turn a failed import inside the block, perhaps deep in a library, into a ``FractalError``.

    It says that ``what`` needs the module that was not found, and to install the ``extra`` in pyproject.toml.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        command = f"pip install '.[{extra}]' in a clone of the project"
        raise FractalError(f"{what} needs {missing}, which is not installed; run {command}") from error
