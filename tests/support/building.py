"""Run ``fractalgen`` in this process, and list the folders that it builds."""

import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

from click.testing import CliRunner, Result

from fractalgen import make_recipe
from fractalgen.cli import main

OPTIONS = "--kind single --n 110 --val 13 --classes 20 --size 32 --points 3000 --shard-size 25"
SMALL = ["build", *OPTIONS.split()]
RECIPE = make_recipe("single", 110, val=13, classes=20, size=32, points=3000, shard_size=25)  # that of SMALL


def run(*arguments: object, environment: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env=environment)


def error_line(result: Result) -> str:
    """Return the only error, which is the last line."""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.stderr.rstrip().endswith(line)
    return line


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def wait_until(holds: Callable[[], object], process: Popen[str] | None = None) -> None:
    """Wait up to two minutes for a condition that should hold before the process ends."""
    deadline = time.monotonic() + 120
    while not holds():
        assert process is None or process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.005)
