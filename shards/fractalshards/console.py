"""The terminal, shared by the three commands: help, one-line errors, exit codes, progress and notes."""

import inspect
import io
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fractalshards.errors import FractalError, StoppedError, Terminated, UsageError, describe_os_error
from fractalshards.human import human_bytes, human_count, human_seconds, one_line
from fractalshards.storage import provide_home, write_bytes
from fractalshards.workers import OnProgress, available_cores, leave_out_current_folder, no_progress

_LOGGERS = ("fractalgen", "fractalshards", "fractaltrain")
_SHORT = {"INTEGER RANGE": "N", "INTEGER": "N", "FLOAT RANGE": "X", "FLOAT": "X", f"0<=x<={2**63 - 1}": "x>=0"}
_ALL = "all"
_LOG_SECONDS = 10.0
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class Command(click.Command):
    """A command whose help groups its options under headings and ends with its example, ``Example: COMMAND``."""

    def __init__(self, *args: Any, groups: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        """``groups`` maps headings to options, ``{"Dataset": "--kind --n"}``; the others come last."""
        super().__init__(*args, **kwargs)
        self.groups = {heading: names.split() for heading, names in (groups or {}).items()}

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the description, wrapped, and the example as it is."""
        text, _, example = inspect.cleandoc(self.help or "").partition("Example: ")
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(text.strip())
        if example:
            with formatter.section("Example"):
                formatter.write("".join(f"  {line}\n" for line in example.strip().splitlines()))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section of options for every heading."""
        headings = {name: heading for heading, names in self.groups.items() for name in names}
        sections: dict[str, list[tuple[str, str]]] = {heading: [] for heading in [*self.groups, "Options"]}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                for long, short in _SHORT.items():
                    record = record[0].replace(long, short), record[1].replace(long, short)
                sections[headings.get(parameter.opts[0], "Options")].append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


class Commands(click.Group):
    """A group of commands whose errors are one line and whose help shows all defaults.

    Exit codes are 2 for wrong usage, 1 for failure, 130 for Ctrl-C and 143 for SIGTERM.
    """

    command_class = Command

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, context_settings={"show_default": True}, **kwargs)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the first sentence of every command's help, uncut."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.get_short_help_str(limit=1000)) for name, one in commands if one])

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line and exit; see ``click.Command.main``."""
        _open_streams()
        show_logs()
        try:
            leave_out_current_folder()
            provide_home()
            code = super().main(*args, **{**options, "standalone_mode": False})
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(2)
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            hint = f" (see '{context.command_path} --help')" if context else ""
            _fail(error.format_message() + hint, error.exit_code)
        except StoppedError as error:
            _fail(str(error), error.code)
        except FractalError as error:
            _fail(str(error), 2 if isinstance(error, UsageError) else 1)
        except OSError as error:
            try:
                sys.stdout.flush()
            except OSError:  # Python would flush again when it exits, and print a message of its own
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            _fail(describe_os_error(error), 1)
        except MemoryError:
            _fail("memory ran out; lower --workers, or give the command more memory", 1)
        except (click.Abort, KeyboardInterrupt) as error:  # an Abort is a RuntimeError, too
            _fail("stopped; run the same command again", _interrupt_code(error))
        except RuntimeError as error:
            if str(error) != "can't start new thread":
                raise
            _fail(f"{error}; lower --workers, or raise the limit of processes (ulimit -u)", 1)
        sys.exit(code if isinstance(code, int) else 0)


def _open_streams() -> None:
    """Open /dev/null for closed standard streams, or the next file would get their number; print any name."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdout, sys.stderr = (stream or os.fdopen(number, "w") for number, stream in ((1, sys.stdout), (2, sys.stderr)))
    if isinstance(sys.stdout, io.TextIOWrapper):
        if isinstance(sys.stdout.buffer, io.RawIOBase):  # under PYTHONUNBUFFERED: what a full disk cuts off is no error
            sys.stdout = os.fdopen(1, "w", 1, sys.stdout.encoding, closefd=False)
        sys.stdout.reconfigure(errors="backslashreplace")
        os.environ.setdefault("PYTHONIOENCODING", ":backslashreplace")  # of child processes


@contextmanager
def continuable(folder: Path) -> Iterator[None]:
    """Say how to continue when Ctrl-C or SIGTERM ends the work on a folder."""
    try:
        yield
    except KeyboardInterrupt as error:
        text = f"{folder}: stopped; finished shards are kept, run the same command again to continue"
        raise StoppedError(text, _interrupt_code(error)) from error


class NamedPath(click.Path):
    """A local path: an unset shell variable would mean the current folder, and ``s3://bucket`` a folder ``s3:``.

    If there are ``endings``, such as ``.png``, its name must have one of them.
    """

    def __init__(self, *endings: str) -> None:
        super().__init__(path_type=Path, readable=False)  # errors of the file system are failures, not wrong usage
        self.endings = endings

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        name = os.fsdecode(value)
        if not name:
            self.fail("is empty; give a path", param, ctx)
        if _URL.match(name):
            self.fail(f"{name} is a URL; give a local path, and use 'fractalshards push' and 'pull'", param, ctx)
        if self.endings and not name.lower().endswith(self.endings):
            self.fail(f"{name}: expected a name that ends in {' or '.join(self.endings)}", param, ctx)
        return super().convert(value, param, ctx)


PATH = NamedPath()
PICTURE = NamedPath(".png", ".jpg")


def _parse_workers(context: click.Context, parameter: click.Parameter, text: str) -> int:
    """Parse ``all`` or a number of processes, at most the number of cores."""
    cores = available_cores()
    if text == _ALL:
        return cores
    if not re.fullmatch("0*[1-9][0-9]{0,8}", text):
        raise UsageError(f"--workers is {text!r}: expected 'all' or a number of at least 1")
    if (workers := int(text)) > cores:
        note(f"note: using {human_count(cores, 'worker')} instead of {workers:,}, one per core")
    return min(workers, cores)


quiet_option = click.option(
    "--quiet",
    is_flag=True,
    is_eager=True,  # before other options print notes
    expose_value=False,
    callback=lambda context, parameter, value: show_logs(value),
    help="Print results, warnings and errors only: no progress, no notes.",
)
workers_option = click.option(
    "--workers",
    default=_ALL,
    metavar=f"{_ALL}|N",
    callback=_parse_workers,
    help="Worker processes, at most one per core.",
)


def note(text: str) -> None:
    """Print a note to stderr, unless ``--quiet``."""
    if not is_quiet():
        click.echo(one_line(text), err=True)


def next_step(command: str, path: Path) -> None:
    """Print the command that usually comes next, with a path as its last argument, unless ``--quiet``."""
    if not is_quiet():
        click.echo(f"next: {command} {shlex.quote(str(path))}")


def write_recipe(text: bytes, out: Path | None, command: str) -> None:
    """Write a portable recipe to a file, and print the command that takes it; without a file, to standard output."""
    if out is None:
        click.echo(text, nl=False)
        return
    write_bytes(out, text)
    click.echo(f"{out}: {human_bytes(len(text))}")
    next_step(command, out)


def is_quiet() -> bool:
    """Return whether the command was called with ``--quiet``."""
    return not logging.getLogger(_LOGGERS[0]).isEnabledFor(logging.INFO)


class _LogHandler(logging.Handler):
    """Prints log records to stderr, each on one line: ``note: ...`` or ``warning: ...``."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "note" if record.levelno < logging.WARNING else record.levelname.lower()
        click.echo(one_line(f"{level}: {record.getMessage()}"), err=True)


_LOG_HANDLER = _LogHandler()


def show_logs(quiet: bool = False) -> None:
    """Print the log records of this project's packages to stderr; if ``quiet``, warnings and errors only."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING if quiet else logging.INFO)
        logger.addHandler(_LOG_HANDLER)


@contextmanager
def progress(label: str, unit: str) -> Iterator[OnProgress]:
    """Show the progress of long work on stderr: a bar on a terminal, else a line every ten seconds.

    Yields the function to call with (done, total). The unit ``B`` is shown as kB, MB and so on. With ``--quiet``
    nothing is shown.
    """
    if is_quiet():
        yield no_progress
        return
    on_terminal = sys.stderr.isatty()
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(label, text="")
    start = shown = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        rate = done / max(now - start, 1e-9)
        left = human_seconds((total - done) / rate) if rate else "?"
        text = f"{done:,} / {total:,} {unit}, {rate:,.{0 if rate >= 10 else 1}f} {unit}/s, {left} left"
        if unit == "B":
            text = f"{human_bytes(done)} / {human_bytes(total)}, {human_bytes(rate)}/s, {left} left"
        if on_terminal:
            bar.update(task, completed=done, total=total, text=text)
            bar.start()  # not earlier: there may be nothing to do
            if done == total:
                bar.stop()  # other work with a bar of its own may follow
        elif now - shown >= _LOG_SECONDS or done == total:
            shown = now
            click.echo(f"{label}: {text}", err=True)

    try:
        yield show
    finally:
        if on_terminal:
            bar.stop()


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"error: {one_line(message)}", err=True)
    sys.exit(code)


def _interrupt_code(error: BaseException) -> int:
    """Return the exit code of a command that a signal ended: 143 after SIGTERM, 130 after Ctrl-C."""
    terminated = isinstance(error, Terminated) or isinstance(error.__cause__, Terminated)  # click wraps interrupts
    return 143 if terminated else 130
