"""Benchmark the stream: shards beside other libraries, rendering while training, images in memory, the first batch.

    python tools/bench_stream.py --json bench.json

Renders images of kind ``single`` first, unless ``--shards`` names a dataset. Every process has one thread. The parts of
a table take turns in every round, and the tables show medians of the CPU time of all processes, which other load on the
machine changes least. ``pip install '.[bench]'`` adds litdata, which is left out where it is missing.
"""

import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from fractalgen import draw_systems
from fractalgen.build import build_shard
from fractalgen.kinds import KINDS
from fractalgen.plan import shard_tasks
from fractalgen.recipe import Recipe
from fractalgen.render import RenderedSplit
from fractalshards.manifest import DatasetInfo, load_manifest, read_record, shard_name, write_manifest, write_record
from fractalshards.png import decode_image
from fractalshards.reader import StoredSplit, index_split, iterate_shard, open_dataset
from fractalshards.storage import write_json
from fractalshards.systems import Systems
from fractaltrain import EpochSampler, RenderedDataset, ShardDataset
from fractaltrain.config import MEMORY_SIZE, WINDOW
from fractaltrain.data.memory import MappedSource
from fractaltrain.data.source import Images
from fractaltrain.recipes import PT_RECIPES
from fractaltrain.recipes.recipe import TrainRecipe, change
from fractaltrain.stream.loader import Batch, Transform, epoch_loader
from fractaltrain.stream.order import epoch_order, training_positions
from fractaltrain.transforms import train_batch, train_transform
from other_loaders import decode_with_pillow, open_others

_TRAINER, _DOOR = "`fractaltrain pt`", "`ShardDataset`, `EpochSampler`, `DataLoader`"
_CORE = "images/s and core"
_SOME = 100  # images whose decoding is timed
_STARTS = 3  # processes that are timed until their first batch
_PLAIN = PT_RECIPES["anderson"]
_IN_WORKERS = {
    "resized crop and flip": "crop=resized,hflip=0.5",
    "random crop to 192": "crop=random",
    "affine": "augment=affine,hflip=0.5",
    "color jitter": "color_jitter=0.3",
    "RandAugment": "randaugment=9",
}
_ON_BATCHES = {"normalizing": "", "erasing": "erasing=0.25", "mixup or cutmix": "mixup=0.8,cutmix=1"}

Source = StoredSplit | RenderedSplit | MappedSource
Part = Callable[[], int]  # returns the number of images that it has made


class Bench(NamedTuple):
    """Settings of the measurements.

    Attributes:
        folder: for files that measurements write.
        shards: the dataset that is read.
        thousand: a dataset of a thousand images in one shard.
        batch_size: images per batch.
        batches: batches per round.
        rounds: rounds to take the median of.
        workers: loader workers.
    """

    folder: Path
    shards: Path
    thousand: Path
    batch_size: int
    batches: int
    rounds: int
    workers: int


class Results(NamedTuple):
    """A table: the format of the numbers in each column, and a row of numbers for each name."""

    columns: dict[str, str]
    rows: dict[str, tuple[float, ...]]


def measure_shards(bench: Bench) -> Results:
    """Shards to shuffled uint8 batches in one process, with our loaders and those of other libraries."""
    stored, dataset = open_dataset(bench.shards), ShardDataset(bench.shards, output="array")
    parts: dict[str, Part] = {
        _TRAINER: partial(_read, stored, bench, bench.batches),
        _DOOR: partial(_load, dataset, bench, bench.batches),
    }
    for name, batches in open_others(load_manifest(bench.shards), bench.folder, bench.batch_size).items():
        parts[name] = partial(_count, batches, bench.batches)
    rates = _rates(parts, bench.rounds)
    return Results(
        {_CORE: ",.0f", "`pt` over it": ".2f", "`ShardDataset` over it": ".2f"},
        {name: (rate, rates[_TRAINER] / rate, rates[_DOOR] / rate) for name, rate in rates.items()},
    )


def measure_workers(bench: Bench) -> Results:
    """Loader workers: CPU time, theirs and that of the process that takes their batches, and memory."""
    stored, dataset = open_dataset(bench.shards), ShardDataset(bench.shards, output="array")
    steps = 15 * bench.batches  # makes the start of the workers negligible
    rates = _rates(
        {
            _TRAINER: partial(_read, stored, bench, steps, bench.workers),
            _DOOR: partial(_load, dataset, bench, steps, bench.workers),
        },
        bench.rounds,
    )
    million = _million(bench)
    stored, dataset = open_dataset(million), ShardDataset(million, output="array")
    memory = {
        _TRAINER: _worker_memory(_stream(stored, bench, steps, bench.workers), steps // 2),
        _DOOR: _worker_memory(_loader(dataset, bench, steps, bench.workers), steps // 2),
    }
    return Results(
        {_CORE: ",.0f", "MB per worker, a million images": ",.0f", "private MB": ",.0f"},
        {name: (rate, *memory[name]) for name, rate in rates.items()},
    )


def measure_rendering(bench: Bench) -> Results:
    """Rendering of every kind: a whole shard as ``build`` makes it, and batches in the random order of training."""
    parts: dict[str, Part] = {}
    for kind in KINDS:
        rendered = RenderedSplit(_recipe(bench, kind))
        parts[f"build {kind}"] = partial(_build_shard, bench.folder, rendered.recipe, draw_systems(rendered.recipe))
        parts[kind] = partial(_read, rendered, bench, bench.batches)
    rates = _rates(parts, bench.rounds)
    return Results(
        {f"`build`, {_CORE}": ",.0f", f"`--render`, {_CORE}": ",.0f", "`--render` over `build`": ".2f"},
        {f"`{kind}`": (rates[f"build {kind}"], rates[kind], rates[kind] / rates[f"build {kind}"]) for kind in KINDS},
    )


def measure_memory(bench: Bench) -> Results:
    """A thousand images kept in memory, beside decoding them in every epoch; no augmentation."""
    stored, dataset = open_dataset(bench.thousand), ShardDataset(bench.thousand, output="array")
    kept = MappedSource(stored, bench.folder, "kept", MEMORY_SIZE, stored.image_size)
    kept_dataset = ShardDataset(bench.thousand, output="array", memory=True, cache_dir=bench.folder)
    parts: dict[str, tuple[Part, Part]] = {
        _TRAINER: (partial(_read, stored, bench), partial(_read, kept, bench)),
        _DOOR: (partial(_load, dataset, bench), partial(_load, kept_dataset, bench)),
    }
    rates = _rates({f"{name}{number}": part for name in parts for number, part in enumerate(parts[name])}, bench.rounds)
    pairs = {name: (rates[f"{name}0"], rates[f"{name}1"]) for name in parts}
    return Results(
        {f"decoding, {_CORE}": ",.0f", f"`--memory`, {_CORE}": ",.0f", "`--memory` over decoding": ".1f"},
        {name: (decoding, memory, memory / decoding) for name, (decoding, memory) in pairs.items()},
    )


def measure_start(bench: Bench) -> Results:
    """The first batch of a million samples, in processes that have imported all modules; numba's cache is warm."""
    opened: dict[str, Callable[[], ShardDataset | RenderedDataset]] = {
        "shards": partial(ShardDataset, _million(bench), output="array")
    }
    for kind in KINDS:
        opened[f"rendered, `{kind}`"] = partial(RenderedDataset, _recipe(bench, kind), output="array")
    spent: dict[str, list[tuple[float, float]]] = defaultdict(list)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        for _ in range(_STARTS):
            for name, open_it in opened.items():
                spent[name].append(processes.submit(_first_batch, open_it, bench.batch_size).result())
    return Results(
        {"CPU seconds": ".2f", "seconds": ".2f"},
        {name: (*map(statistics.median, zip(*times, strict=True)),) for name, times in spent.items()},
    )


def measure_work(bench: Bench) -> Results:
    """The work on one image: decoding, and the augmentations of loader workers and of batches."""
    shard = index_split(load_manifest(bench.shards), "train")[0]
    files = [sample.files["png"] for sample in islice(iterate_shard(shard), _SOME)]
    batch = next(_stream(open_dataset(bench.shards), bench, 1))
    images = [np.ascontiguousarray(image.permute(1, 2, 0).numpy()) for image in batch.images]
    parts: dict[str, Part] = {
        "decoding": lambda: len([decode_image(data) for data in files]),
        "decoding, Pillow": lambda: len([decode_with_pillow(data) for data in files]),
    }
    for name, fields in _IN_WORKERS.items():
        transform = train_transform(_recipe_with(fields), 192 if "192" in name else images[0].shape[0])
        parts[name] = partial(_transform, transform, images)
    for name, fields in _ON_BATCHES.items():
        parts[f"batch: {name}"] = partial(_augment, batch, _recipe_with(fields), load_manifest(bench.shards).classes)
    rates = _rates(parts, bench.rounds)
    return Results({"ms per image": ".3f"}, {name: (1000 / rate,) for name, rate in rates.items()})


_TABLES = {
    "shards": measure_shards,
    "workers": measure_workers,
    "rendered": measure_rendering,
    "memory": measure_memory,
    "start": measure_start,
    "work": measure_work,
}


@click.command()
@click.option("--table", "tables", multiple=True, type=click.Choice(list(_TABLES)), default=list(_TABLES),
              help="What to measure; may be repeated.  [default: all]")  # fmt: skip
@click.option("--shards", type=click.Path(path_type=Path), help="Folder of a dataset.  [default: rendered for this]")
@click.option("--images", default=4000, show_default=True, help="Images of the dataset to render.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(2))
@click.option("--batches", default=8, show_default=True, type=click.IntRange(1), help="Batches per round.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Rounds to take the median of.")
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1), help="Loader workers.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the results to this file.")
def main(tables: tuple[str, ...], shards: Path | None, images: int, json_path: Path | None, **numbers: int) -> None:
    """Benchmark the stream on this machine."""
    torch.set_num_threads(1)
    report = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = shards or _build(folder / "single", images, 500)
        bench = Bench(folder, shards, _build(folder / "thousand", 1000, 1000), **numbers)
        for table in tables:
            report[table] = _TABLES[table](bench)
            _print(table, report[table])
    if json_path:
        write_json(json_path, {name: results._asdict() for name, results in report.items()}, indent=1)


def _build(folder: Path, images: int, shard_size: int) -> Path:
    sizes = ["--n", str(images), "--classes", "100", "--shard-size", str(shard_size)]
    _fractalgen("build", "--kind", "single", *sizes, "--out", str(folder))
    return folder


def _recipe(bench: Bench, kind: str) -> Path:
    """Return the file of a recipe for a million images, written when it is first needed."""
    path = bench.folder / f"{kind}.json"
    if not path.exists():
        path.write_bytes(_fractalgen("recipe", "--kind", kind, "--n", "1000000"))
    return path


def _fractalgen(*arguments: str) -> bytes:
    command = [sys.executable, "-c", "from fractalgen.cli import main; main()", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def _million(bench: Bench) -> Path:
    """Return a dataset of a million images, written when it is first needed: one shard under a thousand names."""
    folder = bench.folder / "million"
    if not folder.exists():
        folder.mkdir()
        manifest = load_manifest(bench.thousand)
        first = read_record(bench.thousand, shard_name("train", 0), manifest.label_type)
        records = [replace(first, name=shard_name("train", number)) for number in range(1000)]
        for record in records:
            os.link(bench.thousand / first.name, folder / record.name)
            write_record(folder, record)
        info = DatasetInfo(manifest.recipe, manifest.label_type, manifest.classes)
        write_manifest(folder, {"train": [record.shard() for record in records]}, info, manifest.image_size)
    return folder


def _stream(source: Source, bench: Bench, steps: int | None = None, workers: int = 0) -> Iterator[Any]:
    """Yield the first batches of an epoch as ``fractaltrain pt`` reads them; all of them without ``steps``."""
    order = epoch_order(source.lengths, 0, 0, WINDOW, _passes(source.lengths, bench, steps))
    positions = training_positions(len(order), bench.batch_size, 0, 1, pad=False)[:steps]
    size = source.read(0).image.shape[0]
    return epoch_loader(source, train_transform(_PLAIN, size), positions, order, 0, 0, workers=workers)


def _loader(dataset: ShardDataset, bench: Bench, steps: int | None = None, workers: int = 0) -> Iterable[Any]:
    """Load the same batches in PyTorch's way."""
    sampler = EpochSampler(dataset, bench.batch_size, passes=_passes(dataset.lengths, bench, steps))
    batches = list(islice(sampler, steps))
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers)


def _passes(lengths: Sequence[int], bench: Bench, steps: int | None) -> int:
    """Return the number of passes over the samples that take this many steps."""
    return max(-(-(steps or 0) * bench.batch_size // sum(lengths)), 1)


def _read(source: Source, bench: Bench, steps: int | None = None, workers: int = 0) -> int:
    return _count(_stream(source, bench, steps, workers))


def _load(dataset: ShardDataset, bench: Bench, steps: int | None = None, workers: int = 0) -> int:
    return _count(_loader(dataset, bench, steps, workers))


def _count(batches: Iterable[Any], steps: int | None = None) -> int:
    """Return the number of images in the next ``steps`` batches, or in all."""
    return sum(len(images) for images, *_ in islice(batches, steps))


def _build_shard(folder: Path, recipe: Recipe, systems: Systems) -> int:
    return build_shard(folder, recipe, systems, shard_tasks(recipe)[0]).samples


def _first_batch(open_it: Callable[[], ShardDataset | RenderedDataset], batch_size: int) -> tuple[float, float]:
    """Return the seconds of CPU time and of the clock from opening the dataset to the first batch."""
    torch.set_num_threads(1)
    begun = time.process_time(), time.perf_counter()
    dataset = open_it()
    next(iter(DataLoader(dataset, batch_sampler=EpochSampler(dataset, batch_size))))
    return time.process_time() - begun[0], time.perf_counter() - begun[1]


def _transform(transform: Transform, images: Sequence[Images]) -> int:
    for key, image in enumerate(images):
        transform(image, key)
    return len(images)


def _augment(batch: Batch, recipe: TrainRecipe, classes: int) -> int:
    images, _ = train_batch(batch, recipe, classes, torch.device("cpu"))
    return len(images)


def _recipe_with(fields: str) -> TrainRecipe:
    return change(_PLAIN, dict(field.split("=") for field in fields.split(",") if field))


def _rates(parts: dict[str, Part], rounds: int) -> dict[str, float]:
    """Return the images per second of CPU time of each part, the median of the rounds after one to warm up."""
    rates: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, part in parts.items():
            start = _cpu_seconds()
            images = part()
            if number:
                rates[name].append(images / (_cpu_seconds() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of those of its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _worker_memory(batches: Iterable[Any], steps: int) -> tuple[float, float]:
    """Return the MB of the largest loader worker after some steps: its peak with shared pages, and private pages."""
    with closing(batch for batch in batches) as open_batches:
        for _ in islice(open_batches, steps):
            pass
        pids = [child.pid for child in multiprocessing.active_children() if child.pid]
        peaks, own = (
            [_megabytes(pid, *field) for pid in pids] for field in (("status", "VmHWM"), ("smaps_rollup", "Private"))
        )
    return max(peaks), max(own)


def _megabytes(pid: int, file: str, field: str) -> float:
    """Return the sum of the fields of a process in /proc whose names begin with ``field``."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _print(name: str, results: Results) -> None:
    table = Table(name, box=MARKDOWN)
    for column in results.columns:
        table.add_column(column, justify="right")
    for row, values in results.rows.items():
        formats = results.columns.values()
        table.add_row(row, *(format(value, form) for value, form in zip(values, formats, strict=True)))
    console = Console(width=200)
    console.print(table, "")


if __name__ == "__main__":
    main()
