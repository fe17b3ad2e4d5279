"""Benchmark ``push`` and ``pull``, compared with ``cp`` and ``curl``.

    python tools/bench_transfer.py --json transfer.json

A dataset of random bytes is in a folder, and served by Python's web server in another process. Each round copies it
with ``cp``, with ``cp`` and ``sync`` (``push`` and ``pull`` also return only when the data is on disk), with ``cp`` and
``sha256sum`` of the copy, with ``push``, and with ``pull`` from the folder; then downloads it with ``curl``, one file
after another and eight at a time, and with ``pull``. ``push`` and ``pull`` hash all bytes, the plain tools do not. The
table shows the median round, and the CPU time, which depends less on other load.
"""

import functools
import hashlib
import http.server
import multiprocessing
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console
from rich.table import Table

from fractalshards.digest import mapping_digest
from fractalshards.manifest import RECIPE, DatasetInfo, Shard, ShardRecord, shard_name, write_manifest, write_record
from fractalshards.remote.transfer import pull, push
from fractalshards.storage import write_json

_PAIRS = {"push": "cp", "pull from a folder": "cp", "pull over HTTP": "curl"}


@click.command()
@click.option("--shards", default=12, show_default=True, type=click.IntRange(1), help="Shards of the dataset.")
@click.option("--megabytes", default=73, show_default=True, type=click.IntRange(1), help="Size of a shard.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Rounds to take the median of.")
@click.option("--jobs", default=8, show_default=True, type=click.IntRange(1), help="Files to push or pull at a time.")
@click.option("--folder", type=click.Path(path_type=Path), help="Work in this file system.  [default: /tmp]")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the results to this file.")
def main(shards: int, megabytes: int, rounds: int, jobs: int, folder: Path | None, json_path: Path | None) -> None:
    """Benchmark push and pull on this machine."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source = Path(work) / "source"
        total = _make_dataset(source, shards, megabytes * 1_000_000)
        with _served(source) as url:
            ways = _ways(source, url, jobs)
            spent: dict[str, list[Spent]] = defaultdict(list)
            for _ in range(rounds + 1):
                for name, way in ways.items():
                    spent[name].append(_measure(Path(work) / "copy", way))
    reports = {name: _report(total, spends[1:]) for name, spends in spent.items()}  # the first warms up
    _print(reports, total)
    if json_path:
        write_json(json_path, {"bytes": total, "jobs": jobs, "rounds": rounds, "ways": reports}, indent=1)


class Spent(NamedTuple):
    """The seconds of one copy: wall-clock time, and CPU time without that of the server."""

    wall: float
    cpu: float


def _ways(source: Path, url: str, jobs: int) -> dict[str, Callable[[Path], object]]:
    names = sorted(path.name for path in source.iterdir())
    files = [f"{url}/{name}" for name in names]
    curl = ["curl", "--silent", "--no-progress-meter", "--fail", "--remote-name-all"]

    def cp(copy: Path) -> None:
        subprocess.run(["cp", "-r", source, copy], check=True)

    def fetch(copy: Path, *options: str) -> None:
        copy.mkdir()
        subprocess.run([*curl, *options, *files], check=True, cwd=copy)  # into the working folder

    def hashed(copy: Path) -> None:
        cp(copy)
        subprocess.run(["sha256sum", *names], check=True, cwd=copy, stdout=subprocess.DEVNULL)

    def synced(way: Callable[[Path], None], copy: Path) -> None:
        way(copy)
        subprocess.run(["sync", "-f", copy], check=True)

    return {
        "cp": cp,
        "cp, then sync": functools.partial(synced, cp),
        "cp, then sha256sum": hashed,
        "push": lambda copy: push(source, str(copy), jobs=jobs),
        "pull from a folder": lambda copy: pull(str(source), copy, jobs=jobs),
        "curl": fetch,
        "curl, eight at a time": lambda copy: fetch(copy, "-Z", "--parallel-max", "8"),
        "curl, then sync": functools.partial(synced, fetch),
        "pull over HTTP": lambda copy: pull(url, copy, jobs=jobs),
    }


def _measure(copy: Path, way: Callable[[Path], object]) -> Spent:
    shutil.rmtree(copy, ignore_errors=True)
    os.sync()
    wall, cpu = time.perf_counter(), _cpu_seconds()
    way(copy)
    return Spent(time.perf_counter() - wall, _cpu_seconds() - cpu)


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _report(total: int, spent: Sequence[Spent]) -> dict[str, float]:
    return {
        "mb_per_s": total / statistics.median(one.wall for one in spent) / 1e6,
        "cpu_s_per_gb": statistics.median(one.cpu for one in spent) / total * 1e9,
    }


def _make_dataset(folder: Path, shards: int, size: int) -> int:
    """Make a dataset whose shards are random bytes; return its size in bytes."""
    folder.mkdir()
    recipe = {"kind": "random bytes"}
    write_json(folder / RECIPE, {"recipe": recipe, "recipe_digest": mapping_digest(recipe)})
    listed: list[Shard] = []
    for number in range(shards):
        offsets = tuple(size * sample // 1000 for sample in range(1001))
        data, name = os.urandom(size), shard_name("train", number)
        (folder / name).write_bytes(data)
        record = ShardRecord(name, 1000, size, hashlib.sha256(data).hexdigest(), f"{number:032x}", (1000,), offsets)
        write_record(folder, record)
        listed.append(record.shard())
    write_manifest(folder, {"train": listed}, DatasetInfo(recipe, "single", 1), None)
    return sum(path.stat().st_size for path in folder.iterdir())


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """Serve the folder over HTTP from another process; yields the URL."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(folder, there), daemon=True)
    process.start()
    yield f"http://127.0.0.1:{here.recv()}"
    process.terminate()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


def _serve(folder: Path, there: Connection) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    there.send(server.server_address[1])
    server.serve_forever()


def _print(reports: dict[str, dict[str, float]], total: int) -> None:
    table = Table("method", "MB/s", "CPU s per GB", "compared with the plain tool", title=f"{total / 1e9:.2f} GB")
    for name, report in reports.items():
        rate, other = report["mb_per_s"], _PAIRS.get(name)
        plain = {way: numbers["mb_per_s"] for way, numbers in reports.items() if other and way.startswith(other)}
        shares = ", ".join(f"{rate / numbers:.0%} of {way!r}" for way, numbers in plain.items())
        table.add_row(name, f"{rate:,.0f}", f"{report['cpu_s_per_gb']:.2f}", shares)
    Console().print(table)


if __name__ == "__main__":
    main()
