"""Builds that lose a worker, a rival, or the file system under them: nothing half-done, no manifest that lies."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from fractalgen.cli import main
from fractalshards.cli import main as shards
from fractalshards.manifest import load_manifest

FRACTALGEN = Path(sys.executable).with_name("fractalgen")


def start(options: list[str], out: Path) -> subprocess.Popen[str]:
    command = [FRACTALGEN, *options, "--out", out]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_until(holds: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline


def children(process: subprocess.Popen[str]) -> list[int]:
    """Worker processes; others, like multiprocessing's resource tracker, render nothing."""
    listing = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], text=True, capture_output=True)
    return [int(line.split()[0]) for line in listing.stdout.splitlines() if "spawn_main" in line]


def slow(small: list[str]) -> list[str]:
    """The same images in name, but each takes a while."""
    return [*small, "--points", "1000000"]


def test_a_worker_that_is_killed_is_replaced(small: list[str], tmp_path: Path) -> None:
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    assert start(slow(small), undisturbed).wait() == 0
    process = start(slow(small), out)
    wait_until(lambda: list(out.glob("*-*.json")), process)
    for worker in children(process):
        subprocess.run(["kill", "-9", str(worker)], check=True)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert load_manifest(out).content_digest() == load_manifest(undisturbed).content_digest()
    assert not list(out.glob(".tmp*"))


def test_two_builds_in_one_folder_make_one_dataset(built: Path, small: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    builds = [start(small, out) for _ in range(2)]
    for process in builds:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert load_manifest(out).content_digest() == load_manifest(built).content_digest()
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in built.iterdir())
    assert CliRunner().invoke(shards, ["verify", str(out)]).exit_code == 0


def test_a_file_system_that_is_lost_ends_the_build_in_one_line(small: list[str], small_disk: Path) -> None:
    out = small_disk / "out"
    process = start(slow(small), out)
    wait_until(lambda: list(out.glob("*-*.json")), process)
    subprocess.run(["umount", "-l", small_disk], check=True)
    _, errors = process.communicate(timeout=120)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", small_disk], check=True)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(f"error: {out}")
    subprocess.run(["umount", small_disk], check=True)
    assert list(small_disk.iterdir()) == [], "something was written where nothing is mounted"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", small_disk], check=True)


@pytest.mark.parametrize("command", ["build", "repair"])
def test_a_finished_dataset_in_a_read_only_file_system_is_fine(
    built: Path, small: list[str], small_disk: Path, command: str
) -> None:
    out = small_disk / "out"
    subprocess.run(["cp", "-r", built, out], check=True)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    arguments = [*small, "--out", str(out)] if command == "build" else ["repair", str(out), "--workers", "1"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(main, [*small, "--n", "111", "--out", str(out)])
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
