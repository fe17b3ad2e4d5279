"""Benchmark reading shards: hashing, decoding compared with Pillow, and ``fractalshards verify`` as a whole.

    python tools/bench_shards.py --json bench.json            # builds a dataset of its own, 4000 images of 224 x 224
    python tools/bench_shards.py shards/single --rounds 9

Each round runs all measurements in turn, and the table shows the median, lowest and highest round. Machines are noisy,
so compare ratios. Units per core second count the CPU time that was used, which depends less on other load. Files come
from the page cache, so storage is not measured. The time of verify includes the start of its worker processes.
"""

import io
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError
from fractalshards.manifest import Manifest, load_manifest
from fractalshards.png import decode_image
from fractalshards.reader import index_split, iterate_shard
from fractalshards.storage import write_json
from fractalshards.verify import verify_dataset
from fractalshards.workers import available_cores, worker_pool

_DECODED = 500  # images of a round


@dataclass(frozen=True)
class Measurement:
    """A measurement: ``work`` processes ``units`` units, for example decodes 500 images."""

    name: str
    unit: str
    units: float
    work: Callable[[], object]


@dataclass(frozen=True)
class Result:
    """Units per second of wall time and of CPU time in every round."""

    name: str
    unit: str
    per_second: tuple[float, ...]
    per_core_second: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the medians and all rounds."""
        medians = {"median": statistics.median(self.per_second), "core_median": statistics.median(self.per_core_second)}
        return {**asdict(self), **medians}


@click.command()
@click.argument("folder", required=False, metavar="[DIR]", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--images", default=4000, show_default=True, type=click.IntRange(1), help="Images of the dataset to build."
)
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Rounds to take the median of.")
@click.option("--workers", "counts", multiple=True, default=(1, 2), show_default=True, type=click.IntRange(1),
              help="Worker processes of verify; may be repeated.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the results to this file.")
def main(folder: Path | None, images: int, rounds: int, counts: tuple[int, ...], json_path: Path | None) -> None:
    """Benchmark reading the shards of the dataset in DIR, or of one built for the purpose."""
    try:
        with _dataset(folder, images) as manifest:
            summary = manifest.summary()
            click.echo(summary)
            results = _take_turns([*_reading(manifest), *_verifying(manifest, counts)], rounds)
    except FractalError as error:
        raise click.ClickException(str(error)) from error
    _print(results)
    if json_path:
        report = {"dataset": summary, "results": [result.to_json() for result in results]}
        write_json(json_path, report, indent=1)


@contextmanager
def _dataset(folder: Path | None, images: int) -> Iterator[Manifest]:
    """Load the dataset in a folder, or build a temporary one: kind ``single``, 224 x 224, shards of 1000."""
    if folder:
        yield load_manifest(folder)
        return
    # not at the top: the workers of verify import this file and should not import numba
    from fractalgen import make_recipe
    from fractalgen.build import open_folder, plan_build, run_build

    recipe = make_recipe("single", images, classes=min(images, 100))
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / recipe.kind
        with worker_pool(available_cores()) as pool:
            run_build(plan_build(open_folder(target, recipe)), pool)
        yield load_manifest(target)


def _reading(manifest: Manifest) -> list[Measurement]:
    """Measure hashing and decoding in this process, on one core."""
    shard = index_split(manifest, next(iter(manifest.splits)))[0]
    samples = list(islice(iterate_shard(shard), _DECODED))
    images = [data for sample in samples for name, data in sample.files.items() if name not in ("cls", "json")]
    return [
        Measurement("sha256", "MB", shard.path.stat().st_size / 1e6, partial(sha256_file, shard.path)),
        Measurement("decode", "images", len(images), partial(_decode_all, decode_image, images)),
        Measurement("decode, Pillow", "images", len(images), partial(_decode_all, _pillow, images)),
    ]


def _verifying(manifest: Manifest, counts: Sequence[int]) -> list[Measurement]:
    """Measure verify by number of worker processes."""
    samples = sum(map(manifest.samples, manifest.splits))
    return [
        Measurement(f"verify with {count}", "images", samples, partial(_verify, manifest, count)) for count in counts
    ]


def _decode_all(decode: Callable[[bytes], object], images: Sequence[bytes]) -> None:
    for image in images:
        decode(image)


def _pillow(data: bytes) -> object:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _verify(manifest: Manifest, workers: int) -> None:
    if problems := verify_dataset(manifest, workers):
        raise FractalError(f"{manifest.folder}/{problems[0]}; measure a sound dataset")


def _take_turns(measurements: Sequence[Measurement], rounds: int) -> list[Result]:
    """Run every measurement once to warm up, then once per round."""
    for measurement in measurements:
        measurement.work()
    rates = [[_rates(measurement) for measurement in measurements] for _ in range(rounds)]
    return [
        Result(measurement.name, measurement.unit, *zip(*column, strict=True))
        for measurement, column in zip(measurements, zip(*rates, strict=True), strict=True)
    ]


def _rates(measurement: Measurement) -> tuple[float, float]:
    """Return units per second of wall time, and of CPU time including finished child processes."""
    start, start_core = time.perf_counter(), _core_seconds()
    measurement.work()
    return measurement.units / (time.perf_counter() - start), measurement.units / (_core_seconds() - start_core)


def _core_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _print(results: Sequence[Result]) -> None:
    table = Table("", "per second", "lowest", "highest", "per core second")
    for result in results:
        figures = [statistics.median(result.per_second), min(result.per_second), max(result.per_second)]
        figures.append(statistics.median(result.per_core_second))
        table.add_row(f"{result.name}, {result.unit}", *(f"{figure:,.0f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
