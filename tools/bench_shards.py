"""Measures how fast shards are checked: hashing, decoding beside Pillow, and the whole of ``fractalshards verify``.

    python tools/bench_shards.py --json bench.json            # builds a dataset of its own, 4000 images of 224 x 224
    python tools/bench_shards.py shards/single --rounds 9

All measurements take turns in every round, and the median of the rounds is given with the lowest and the highest, for
machines are noisy: trust ratios. Beside units per second of the clock stand units per second of a core, that is of the
time that processors really worked on it, which other people's work changes less. Files come from the page cache, so
storage is not measured. The whole of verify has the start of its worker processes in it, as its users have.
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
    """Something to measure: ``work`` does so many units, e.g. decodes 500 images."""

    name: str
    unit: str
    units: float
    work: Callable[[], object]


@dataclass(frozen=True)
class Result:
    """What was measured: units per second of the clock, and of the cores that worked, of every round."""

    name: str
    unit: str
    per_second: tuple[float, ...]
    per_core_second: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """The medians and every round."""
        medians = {"median": statistics.median(self.per_second), "core_median": statistics.median(self.per_core_second)}
        return {**asdict(self), **medians}


@click.command()
@click.argument("folder", required=False, metavar="[DIR]", type=click.Path(path_type=Path, exists=True))
@click.option("--images", default=4000, show_default=True, type=click.IntRange(1), help="Of the dataset to build.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="The median of so many.")
@click.option("--workers", "counts", multiple=True, default=(1, 2), show_default=True, type=click.IntRange(1),
              help="Worker counts of verify to compare, each with an option of its own.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the numbers here.")
def main(folder: Path | None, images: int, rounds: int, counts: tuple[int, ...], json_path: Path | None) -> None:
    """Measure on this machine how fast shards are checked, of the dataset in DIR or of one built for it."""
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
    """The dataset in a folder, or one built for the while: kind ``single``, 224 x 224, shards of 1000."""
    if folder:
        yield load_manifest(folder)
        return
    # not above, for the workers of verify import this file, and shall not import numba with it
    from fractalgen import make_recipe
    from fractalgen.build import open_folder, plan_build, run_build

    recipe = make_recipe("single", images, classes=min(images, 100))
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / recipe.kind
        with worker_pool(available_cores()) as pool:
            run_build(plan_build(open_folder(target, recipe)), pool)
        yield load_manifest(target)


def _reading(manifest: Manifest) -> list[Measurement]:
    """Hashing and decoding in this process, so on one core."""
    shard = index_split(manifest, next(iter(manifest.splits)))[0]
    samples = list(islice(iterate_shard(shard), _DECODED))
    images = [data for sample in samples for name, data in sample.files.items() if name not in ("cls", "json")]
    return [
        Measurement("sha256", "MB", shard.path.stat().st_size / 1e6, partial(sha256_file, shard.path)),
        Measurement("decode", "images", len(images), partial(_decode_all, decode_image, images)),
        Measurement("decode, Pillow", "images", len(images), partial(_decode_all, _pillow, images)),
    ]


def _verifying(manifest: Manifest, counts: Sequence[int]) -> list[Measurement]:
    """The whole of verify by number of worker processes."""
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
    """Do the work of every measurement once to warm up, then once a round."""
    for measurement in measurements:
        measurement.work()
    rates = [[_rates(measurement) for measurement in measurements] for _ in range(rounds)]
    return [
        Result(measurement.name, measurement.unit, *zip(*column, strict=True))
        for measurement, column in zip(measurements, zip(*rates, strict=True), strict=True)
    ]


def _rates(measurement: Measurement) -> tuple[float, float]:
    """Units per second of the clock, and of the cores that worked, children that ended included."""
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
