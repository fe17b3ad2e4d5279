"""Options of all commands: paths, ``--workers``, ``--quiet``, ``--set``, ``--slice``; log records and errors."""

import errno
import logging
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import click
import pytest
from click.testing import CliRunner, Result

from damages import edit_split
from fractalshards.cli import main
from fractalshards.console import Commands, NamedPath, progress, quiet_option, show_logs, workers_option
from fractalshards.errors import Terminated, UsageError
from fractalshards.human import parse_bytes
from fractalshards.settings import Slice, override, parse_settings, parse_slice
from packing import assert_refused


@click.group(cls=Commands)
def program() -> None:
    """Print the options."""


@program.command()
@click.argument("text", default="")
@workers_option
@quiet_option
def work(text: str, workers: int) -> None:
    """Print a text and the number of workers."""
    logging.getLogger("fractalshards.somewhere").info("a note")
    logging.getLogger("fractalshards.somewhere").warning("a\nwarning")
    click.echo(f"{text}{workers}")


def run(*arguments: str, **options: str) -> Result:
    return CliRunner(**options).invoke(program, ["work", *arguments])


def test_all_paths_reject_empty_text_and_urls():
    parameters = [parameter for command in main.commands.values() for parameter in command.params]
    paths = [parameter for parameter in parameters if isinstance(parameter.type, click.Path)]
    assert len(paths) > 10
    assert all(isinstance(parameter.type, NamedPath) for parameter in paths)
    for given in ("", "s3://bucket/folder", "file:///folder"):
        result = CliRunner().invoke(main, ["diff", ".", given])
        assert result.exit_code == 2, result.output
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("given", "used"), [([], 3), (["all"], 3), (["2"], 2), (["3"], 3), (["999"], 3)], ids=str)
def test_workers_are_at_most_the_cores(given, used, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 5})
    result = run("--quiet", *(f"--workers={number}" for number in given))
    assert (result.stdout, result.stderr) == (f"{used}\n", "warning: a warning\n")


@pytest.mark.parametrize("given", ["0", "-1", "none", "", "1.5", "9" * 5000])
def test_workers_reject(given):
    result = run("--workers", given)
    assert_refused(result, 2, "--workers")
    assert len(result.stderr) < 2100


def test_lines_are_printed_once_and_in_any_encoding():
    result = run("é 類 \udcff", "--workers=1", charset="iso8859-15")
    assert (result.exit_code, result.stdout_bytes) == (0, b"\xe9 \\u985e \\udcff1\n")
    assert result.stderr == "note: a note\nwarning: a warning\n"


def test_bars_do_not_overlap(monkeypatch, capsys):
    """A bar hides the cursor until its work is done, not until that of the next bar is."""
    show_logs()  # a test before this one may have been --quiet
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("first", "images") as first, progress("second", "images") as second:
        first(1, 2)
        assert "\x1b[?25h" not in capsys.readouterr().err
        first(2, 2)
        assert capsys.readouterr().err.endswith("\x1b[?25h")
        second(1, 2)
        assert "first" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "noun"),
    [
        (MemoryError(), 1, "memory"),
        (RuntimeError("can't start new thread"), 1, "ulimit -u"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), 1, "ulimit -u"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "ulimit -n"),
        (KeyboardInterrupt(), 130, "again"),
        (Terminated(), 143, "again"),
    ],
)
def test_lack_of_something_and_signals_are_one_line(dataset, monkeypatch, error, code, noun):
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("fractalshards.cli.verify_dataset", fail)
    assert_refused(CliRunner().invoke(main, ["verify", str(dataset)]), code, noun)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "command",
    [
        *("verify SMALL", "report SMALL --out OUT/page.html", "diff SMALL OTHER"),
        *("push SMALL OUT", "pull SMALL OUT", "pack imagefolder:FLOWERS OUT"),
    ],
)
def test_quiet_prints_results_only(command, dataset, flowers, tmp_path):
    other = shutil.copytree(dataset, tmp_path / "other")
    edit_split(other, content_digests=["0" * 32, "1" * 32])  # so that ``diff`` reads images
    words = command.split()
    for name, path in {"SMALL": dataset, "OTHER": other, "FLOWERS": flowers}.items():
        words = [word.replace(name, str(path)) for word in words]
    loud = CliRunner().invoke(main, [word.replace("OUT", f"{tmp_path}/loud") for word in words])
    quiet = CliRunner().invoke(main, [*(word.replace("OUT", f"{tmp_path}/quiet") for word in words), "--quiet"])
    assert loud.exit_code == quiet.exit_code, quiet.output
    results = [line for line in loud.stdout.splitlines() if not line.startswith("next: ")]
    assert len(results) == quiet.stdout.count("\n") > 0
    assert (bool(loud.stderr), quiet.stderr) == (True, "")


@pytest.mark.parametrize("flags", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_output_that_a_full_disk_cuts_off_is_an_error(dataset, tmp_path, flags):
    code = (
        "import resource, sys; from fractalshards.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)); main(sys.argv[1:])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, *flags, "-c", code, "info", "--json", dataset]
    with (tmp_path / "out.txt").open("wb") as stdout:
        ended = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=environment, text=True)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1), ended.stderr


@dataclass(frozen=True)
class Record:
    name: str = "fixed"
    count: int = 1
    rate: float = 0.5
    wanted: bool = True
    mode: Literal["slow", "fast"] = "slow"
    decay: float | None = None
    pair: tuple[int, int] = (2, 4)
    px: ClassVar[str] = "unit"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("count=7", 7), ("rate=.5e-3", 5e-4), ("wanted=no", False), ("wanted=True", True), ("mode=fast", "fast"),
        ("decay=0.1", 0.1), ("decay=none", None), ("pair=3, 5", (3, 5)), ("pair=3", (3, 3)),
    ],
)  # fmt: skip
def test_override_of_every_type(text, value):
    changes = parse_settings(["count=x", "count=1", text])  # the last one wins
    assert getattr(override(Record(), changes, fixed=("name",)), text.partition("=")[0]) == value


@pytest.mark.parametrize(
    "text",
    [
        *("count", "=3", "count=1.5", "rate=x", "rate=inf", "wanted=2", "mode=medium", "pair=1,2,3", "decay=x"),
        *("conut=3", "xyz=3", "name=x", "px=x"),
    ],
)
def test_override_rejects(text):
    with pytest.raises(UsageError, match=text.partition("=")[0] or "--set") as caught:
        override(Record(), parse_settings([text]), fixed=("name",))
    assert ("'count'" in str(caught.value)) == (text == "conut=3")


SGE = {"SGE_TASK_ID": "4", "SGE_TASK_FIRST": "2", "SGE_TASK_LAST": "8", "SGE_TASK_STEPSIZE": "2"}


def slurm(number: int, first: int, last: int, step: int | None = None) -> dict[str, str]:
    values = {"ID": number, "MIN": first, "MAX": last, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items() if value is not None}


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("3/10", {}, (3, 10)),
        ("1/1", {"SLURM_ARRAY_TASK_ID": "7"}, (1, 1)),
        ("auto", slurm(0, 0, 9) | {"KEY": "9" * 5000}, (1, 10)),
        ("auto", slurm(9, 0, 9), (10, 10)),
        ("auto", slurm(7, 3, 11, 4), (2, 3)),
        ("auto/9", slurm(2, 2, 2), (2, 9)),
        ("auto", SGE, (2, 4)),
        ("auto/5", {"PBS_ARRAY_INDEX": "5"}, (5, 5)),
        ("auto/5", {"PBS_ARRAYID": "1"}, (1, 5)),
        *((text, {}, None) for text in ("0/3", "4/3", "1/0", "3", "-1/3", "auto/x", "auto", "", "9" * 5000 + "/2")),
        ("auto", {"SGE_TASK_ID": "undefined"}, None),
        ("auto", {"PBS_ARRAY_INDEX": "3"}, None),
        ("auto/3", {"PBS_ARRAY_INDEX": "0"}, None),
    ],
    ids=str,
)
def test_parse_slice(text, environment, expected):
    with nullcontext() if expected else pytest.raises(UsageError, match="--slice"):
        assert parse_slice(text, environment) == Slice(*expected or (1, 1))


@pytest.mark.parametrize(
    ("text", "size"),
    [("1.5 mb", 1_500_000), ("1GiB", 1 << 30), ("700", 700)] + [(text, None) for text in ("", "GB", "-1GB", "1PB")],
)
def test_parse_bytes(text, size):
    with pytest.raises(UsageError, match="--cache-size") if size is None else nullcontext():
        assert parse_bytes(text, "--cache-size") == size
