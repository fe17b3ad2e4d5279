"""Soak test: kill a build repeatedly at random moments, let it finish, and compare it with an uninterrupted one.

    python tools/soak_kill.py --kills 200 --shards 50

Each kill is a SIGKILL to the whole build or to one of its workers. After each, every visible shard must be complete; at
the end the content digests must be those of the uninterrupted build. Exits with 1 if anything is wrong.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click

from fractalshards.console import progress
from fractalshards.digest import sha256_file
from fractalshards.manifest import INFO, load_manifest, read_record, sidecar_name
from fractalshards.verify import verify_dataset

_FRACTALGEN = Path(sys.executable).with_name("fractalgen")


@dataclass
class Tally:
    """The events of a soak test."""

    builds_killed: int = 0
    workers_killed: int = 0
    builds_finished: int = 0
    wrong: int = 0


@click.command()
@click.option("--kills", default=200, show_default=True, type=click.IntRange(1), help="SIGKILLs to send.")
@click.option("--shards", default=50, show_default=True, type=click.IntRange(1), help="Shards of the dataset.")
@click.option("--kind", default="single", show_default=True, help="Kind of images.")
@click.option("--seed", default=0, show_default=True, help="Seed of the times and the processes to kill.")
@click.option("--minutes", default=20.0, show_default=True, help="Time limit; the test fails when it is reached.")
def main(kills: int, shards: int, kind: str, seed: int, minutes: float) -> None:
    """Kill builds repeatedly, and check that the dataset is still right."""
    with tempfile.TemporaryDirectory() as name:
        uninterrupted, soaked = Path(name) / "uninterrupted", Path(name) / "soaked"
        options = _options(kind, shards)
        start = time.monotonic()
        subprocess.run([*options, "--out", uninterrupted], check=True, capture_output=True)
        expected = load_manifest(uninterrupted).content_digest()
        whole = time.monotonic() - start
        tally = _soak([*options, "--out", soaked], soaked, kills, expected, whole, random.Random(seed), 60 * minutes)
        _check_end(soaked, uninterrupted, tally)
    killed = tally.builds_killed + tally.workers_killed
    click.echo(
        f"{killed} kills ({tally.builds_killed} of builds, {tally.workers_killed} of workers), "
        f"{tally.builds_finished} builds finished, {tally.wrong} wrong digests"
    )
    sys.exit(1 if tally.wrong or killed < kills else 0)


def _options(kind: str, shards: int) -> list[str | Path]:
    n = 8 * shards
    options = f"build --kind {kind} --n {n} --classes {min(n, 20)} --size 64 --points 100000 --shard-size 8 --workers 2"
    return [_FRACTALGEN, *options.split()]


def _soak(
    command: list[str | Path], folder: Path, kills: int, expected: str, whole: float, rng: random.Random, limit: float
) -> Tally:
    """Start the build until it has been killed ``kills`` times; remove the dataset and start over if it finishes."""
    tally = Tally()
    deadline = time.monotonic() + limit
    with progress("killing", "kills") as on_progress:
        while tally.builds_killed + tally.workers_killed < kills and time.monotonic() < deadline:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _kill_at_random(process, rng, whole, tally)
            on_progress(tally.builds_killed + tally.workers_killed, kills)
            tally.wrong += _count_wrong(folder, expected)
            if process.wait() == 0:
                tally.builds_finished += 1
                shutil.rmtree(folder)
    subprocess.run(command, check=True, capture_output=True)
    return tally


def _kill_at_random(process: subprocess.Popen[bytes], rng: random.Random, pause: float, tally: Tally) -> None:
    """Kill workers of a build at random moments, up to ``pause`` seconds apart, then the build, if it still runs."""
    while True:
        try:
            process.wait(rng.uniform(0, pause))
            return
        except subprocess.TimeoutExpired:
            workers = _workers(process.pid)
        if workers and rng.random() < 0.5:
            os.kill(rng.choice(workers), signal.SIGKILL)
            tally.workers_killed += 1
        else:
            process.kill()
            tally.builds_killed += 1
            return


def _workers(parent: int) -> list[int]:
    listing = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(parent)], text=True, capture_output=True).stdout
    return [int(line.split()[0]) for line in listing.splitlines() if "spawn_main" in line]


def _count_wrong(folder: Path, expected: str) -> int:
    """Count wrong files: sidecars that do not match their tars, manifests with missing shards or other digests."""
    sidecars = {path.name for path in folder.glob("*-*.json") if not path.name.startswith(".")}
    wrong = 0
    for name in sidecars:
        record = read_record(folder, Path(name).with_suffix(".tar").name, "single")
        wrong += sha256_file(folder / record.name) != record.sha256
    if (folder / INFO).exists():
        manifest = load_manifest(folder)
        listed = {sidecar_name(shard.name) for shards in manifest.splits.values() for shard in shards}
        wrong += manifest.content_digest() != expected or listed != sidecars
    return wrong


def _check_end(folder: Path, uninterrupted: Path, tally: Tally) -> None:
    tally.wrong += load_manifest(folder).content_digest() != load_manifest(uninterrupted).content_digest()
    tally.wrong += len(verify_dataset(load_manifest(folder), 2))
    tally.wrong += {path.name for path in folder.iterdir()} != {path.name for path in uninterrupted.iterdir()}


if __name__ == "__main__":
    main()
