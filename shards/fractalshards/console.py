"""What all three commands share at the terminal: one-line errors, exit codes, progress on a terminal or in a log."""

import errno
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fractalshards.errors import FractalError, StoppedError, Terminated, UsageError
from fractalshards.human import human_bytes, human_seconds, one_line

_LOG_SECONDS = 10.0
_NOTICE_SECONDS = 1.0
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


class Commands(click.Group):
    """A group of commands whose errors are one line.

    Exit codes are 2 for wrong usage, 1 for failure, 130 for Ctrl-C and 143 for SIGTERM.
    """

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line; see ``click.Command.main``."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        try:
            code = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(2)
        except click.UsageError as error:
            hint = f" (see '{error.ctx.command_path} --help')" if error.ctx else ""
            _fail(error.format_message() + hint, 2)
        except click.ClickException as error:
            _fail(error.format_message(), 1)
        except StoppedError as error:
            _fail(str(error), error.code)
        except FractalError as error:
            _fail(str(error), 2 if isinstance(error, UsageError) else 1)
        except OSError as error:
            _fail(describe_os_error(error), 1)
        except (click.Abort, KeyboardInterrupt) as error:
            _fail("stopped", interrupt_code(error))
        sys.exit(code if isinstance(code, int) else 0)


def interrupt_code(error: BaseException) -> int:
    """The exit code of a command that a signal ended: 128 + its number, as a shell has it."""
    terminated = isinstance(error, Terminated) or isinstance(error.__cause__, Terminated)  # click wraps what it sees
    return 128 + (signal.SIGTERM if terminated else signal.SIGINT)


@contextmanager
def continuable(folder: Path) -> Iterator[None]:
    """Say how to go on when Ctrl-C or SIGTERM ends the work on a folder."""
    try:
        yield
    except KeyboardInterrupt as error:
        text = f"{folder}: stopped; finished shards are kept, run the same command again to go on"
        raise StoppedError(text, interrupt_code(error)) from error


def describe_os_error(error: OSError) -> str:
    """An operating system's error as one line: which file, what, and what to do."""
    where = f"{error.filename}: " if error.filename else ""
    advice = _ADVICE.get(error.errno or 0, "")
    return f"{where}{error.strerror or error}" + (f"; {advice}" if advice else "")


def unseen(*_: object) -> AbstractContextManager[Callable[[int], None]]:
    """In place of ``progress``, where another process shows it."""
    return nullcontext(lambda count: None)


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Show progress of ``total`` units of long work on stderr; yields a function that advances it by so many.

    The unit ``B`` is shown as kB, MB and so on.
    On a terminal a bar; elsewhere a line every ten seconds, without carriage returns.
    """
    meter = _Meter(total, unit)
    if not sys.stderr.isatty():

        def log(count: int) -> None:
            meter.done += count
            if meter.due() or meter.done == total:
                click.echo(f"{label}: {meter.reached()}, {meter.pace()}", err=True)

        yield log
        return

    columns = [TextColumn(text) for text in ("{task.description}", "{task.fields[reached]}", "{task.fields[pace]}")]
    with Progress(columns[0], BarColumn(), *columns[1:], console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total, reached=meter.reached(), pace="")

        def draw(count: int) -> None:
            meter.done += count
            bar.update(task, completed=meter.done, reached=meter.reached(), pace=meter.pace())

        yield draw


@contextmanager
def notice(text: str) -> Iterator[None]:
    """Say on stderr what is going on, if it takes more than a second."""
    timer = threading.Timer(_NOTICE_SECONDS, click.echo, [text], {"err": True})
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Meter:
    """Counts work done, and says how fast it goes."""

    def __init__(self, total: int, unit: str) -> None:
        self.done = 0
        self._total = total
        self._unit = unit
        self._start = time.monotonic()
        self._shown = self._start

    def due(self) -> bool:
        """Whether it is time for another line of a log."""
        now = time.monotonic()
        if now - self._shown < _LOG_SECONDS:
            return False
        self._shown = now
        return True

    def reached(self) -> str:
        """What is done, of how much."""
        if self._unit == "B":
            return f"{human_bytes(self.done)} / {human_bytes(self._total)}"
        return f"{self.done:,} / {self._total:,} {self._unit}"

    def pace(self) -> str:
        """Rate so far and time left."""
        rate = self.done / max(time.monotonic() - self._start, 1e-9)
        left = human_seconds((self._total - self.done) / rate) if rate else "?"
        return f"{human_bytes(rate) if self._unit == 'B' else f'{rate:,.0f} {self._unit}'}/s, {left} left"


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"error: {one_line(message)}", err=True)
    sys.exit(code)
