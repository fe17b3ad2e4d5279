"""Options that all commands share: paths, ``--workers``, ``--quiet``; log records and errors on the terminal."""

import errno
import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from damages import edit_split
from fractalshards import workers
from fractalshards.cli import main
from fractalshards.console import Commands, NamedPath, progress, quiet_option, show_logs, workers_option
from fractalshards.errors import describe_os_error


@click.group(cls=Commands)
def program() -> None:
    """Print the options."""


@program.command()
@workers_option
@quiet_option
def work(workers: int) -> None:
    """Print the number of workers."""
    logging.getLogger("fractalshards.somewhere").info("a note")
    logging.getLogger("fractalshards.somewhere").warning("a\nwarning")
    click.echo(workers)


@program.command()
@click.argument("text")
def say(text: str) -> None:
    """Print a text."""
    click.echo(text)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(program, ["work", *map(str, arguments)])


def test_all_paths_reject_empty_text_and_urls() -> None:
    parameters = [parameter for command in main.commands.values() for parameter in command.params]
    paths = [parameter for parameter in parameters if isinstance(parameter.type, click.Path)]
    assert len(paths) > 10
    assert all(isinstance(parameter.type, NamedPath) for parameter in paths)
    for given in ("", "s3://bucket/folder", "file:///folder"):
        result = CliRunner().invoke(main, ["diff", ".", given])
        assert result.exit_code == 2, result.output
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("given", "used"), [([], 3), (["all"], 3), (["2"], 2), (["3"], 3), (["999"], 3)], ids=str)
def test_workers_are_at_most_the_cores(given: list[str], used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 5})
    result = run("--quiet", *(["--workers", *given] if given else []))
    assert (result.stdout, result.stderr) == (f"{used}\n", "warning: a warning\n")


@pytest.mark.parametrize("given", ["0", "-1", "none", "", "1.5", "9" * 5000])
def test_workers_reject(given: str) -> None:
    result = run("--workers", given)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --workers")
    assert len(result.stderr) < 2100


def test_log_records_are_printed_on_one_line() -> None:
    assert run().stderr == "note: a note\nwarning: a warning\n"


def test_bars_do_not_overlap(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
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
    ("error", "noun"),
    [
        (MemoryError(), "memory"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
    ],
)
def test_lack_of_something_is_one_line(
    dataset: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, noun: str
) -> None:
    def run_out(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("fractalshards.cli.verify_dataset", run_out)
    result = CliRunner().invoke(main, ["verify", str(dataset)])
    assert (result.exit_code, result.stderr.count("error: ")) == (1, 1)
    assert noun in result.stderr.splitlines()[-1]


def test_names_are_printed_in_any_encoding() -> None:
    result = CliRunner(charset="iso8859-15").invoke(program, ["say", "é 類 \udcff"])
    assert (result.exit_code, result.stdout_bytes) == (0, b"\xe9 \\u985e \\udcff\n")


def test_os_error_names_the_file() -> None:
    assert describe_os_error(OSError(errno.ENOSPC, "No space left on device", "a.tar")).startswith("a.tar: No space")
    assert describe_os_error(OSError("text alone")) == "text alone"


@pytest.mark.parametrize("command", ["verify", "report", "diff", "push", "pull", "pack"])
def test_quiet_prints_results_only(
    command: str, dataset: Path, flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_Pool", ThreadPoolExecutor)
    other = shutil.copytree(dataset, tmp_path / "other")
    edit_split(other, content_digests=["0" * 32, "1" * 32])  # so that ``diff`` reads images

    def run_main(name: str, *options: str) -> Result:
        out = tmp_path / name
        arguments = {
            "verify": [dataset],
            "report": [dataset, "--out", out / "page.html"],
            "diff": [dataset, other],
            "push": [dataset, out],
            "pull": [dataset, out],
            "pack": [f"imagefolder:{flowers}", out],
        }[command]
        return CliRunner().invoke(main, [command, *map(str, arguments), *options])

    loud, quiet = run_main("loud"), run_main("quiet", "--quiet")
    assert loud.exit_code == quiet.exit_code, quiet.output
    results = [line for line in loud.stdout.splitlines() if not line.startswith("next: ")]
    assert len(results) == quiet.stdout.count("\n") > 0
    assert (bool(loud.stderr), quiet.stderr) == (True, "")


@pytest.mark.parametrize("flags", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_output_that_a_full_disk_cuts_off_is_an_error(dataset: Path, tmp_path: Path, flags: list[str]) -> None:
    code = (
        "import resource, sys; from fractalshards.cli import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300)); main(sys.argv[1:])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with (tmp_path / "out.txt").open("wb") as stdout:
        ended = subprocess.run(
            [sys.executable, *flags, "-c", code, "info", "--json", dataset],
            stdout=stdout,
            stderr=subprocess.PIPE,
            env=environment,
        )
    assert ended.returncode == 1, ended.stderr.decode()
    assert len(ended.stderr.splitlines()) == 1, ended.stderr.decode()
