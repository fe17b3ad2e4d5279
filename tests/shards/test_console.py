"""What all commands share: paths that are not empty, as many workers as there are cores, silence on request."""

import os
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from fractalshards import console
from fractalshards.cli import main
from fractalshards.console import PATH, Commands, notice, quiet_option, workers_option
from fractalshards.workers import worker_pool


@click.group(cls=Commands)
def program() -> None:
    """Tell what was given."""


@program.command()
@click.option("--seconds", default=0.0)
@workers_option
@quiet_option
def work(seconds: float, workers: int) -> None:
    """Tell the number of workers, after a while."""
    with notice("this takes long"):
        time.sleep(seconds)
    click.echo(workers)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(program, ["work", *map(str, arguments)])


def test_every_path_is_of_the_type_that_refuses_empty_text() -> None:
    parameters = [parameter for command in main.commands.values() for parameter in command.params]
    paths = [parameter for parameter in parameters if isinstance(parameter.type, click.Path)]
    assert len(paths) > 10
    assert all(parameter.type is PATH for parameter in paths)


@pytest.mark.parametrize("arguments", [["recipe", ".", "--out", ""], ["diff", ".", ""]])
def test_an_empty_path_is_refused(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert "is empty; give a path" in line


@pytest.mark.parametrize(
    ("given", "used", "note"),
    [
        ([], 3, ""),
        (["--workers", "all"], 3, ""),
        (["--workers", "2"], 2, ""),
        (["--workers", "3"], 3, ""),
        (["--workers", "999"], 3, "note: 3 workers instead of 999, for there are no more cores\n"),
        (["--workers", "999", "--quiet"], 3, ""),
    ],
    ids=str,
)
def test_there_are_no_more_workers_than_cores(
    given: list[str], used: int, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 2, 5})
    result = run(*given)
    assert (result.stdout, result.stderr) == (f"{used}\n", note)


@pytest.mark.parametrize("given", ["0", "-1", "none", "", "1.5", "9" * 5000])
def test_what_is_no_number_of_workers_is_refused(given: str) -> None:
    result = run("--workers", given)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: --workers is '{given[:9]}")
    assert "expected 'all' or a number of at least 1" in result.stderr or len(given) > 2000


def test_no_more_workers_are_started_than_there_are_tasks() -> None:
    with worker_pool(8) as pool:
        others = {pool.submit(os.getpid) for _ in range(2)}
        assert len({future.result(60) for future in others}) <= 2


def test_a_notice_is_for_what_takes_long_unless_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_NOTICE_SECONDS", 0.1)
    assert run("--seconds", 0).stderr == ""
    assert run("--seconds", 0.5).stderr == "this takes long\n"
    assert run("--seconds", 0.5, "--quiet").stderr == ""
