"""Benchmark the data loading of the trainer: images/s from shards and rendered, compared with one resident batch.

    python tools/bench_train.py --shards shards/single --render single.json --workers 12 --out bench.json

All run in turn in the same process, with the training step of ``fractaltrain pt``, so the ratio to the batch that stays
on the device shows the cost of the stream. Batches that loader workers have prepared are consumed before a measurement,
so that it shows the rate that they sustain. Peak memory is that of the GPU, or of this process on a CPU. Prints a line
per model, batch size and compilation mode; a case that fails is reported, and the others run.
"""

import platform
import resource
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import count, product, repeat
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import torch

from fractalgen.render import RenderedSplit
from fractalshards.human import human_bytes, one_line
from fractalshards.manifest import load_manifest
from fractalshards.reader import StoredSplit
from fractalshards.storage import write_json
from fractaltrain.config import WINDOW, Amp, RunConfig
from fractaltrain.data.rendered import open_rendered
from fractaltrain.data.source import SampleSource
from fractaltrain.distributed import World
from fractaltrain.models import create_model
from fractaltrain.optim import TrainState, build_state, train_step
from fractaltrain.recipes import PT_RECIPES
from fractaltrain.stream.loader import Batch, epoch_loader
from fractaltrain.stream.order import epoch_order, training_positions
from fractaltrain.transforms import train_batch, train_transform

_PREPARED = 4  # batches that a loader worker prepares ahead
_EPOCH_STEPS = 2000
_RECIPE = PT_RECIPES["anderson"]


@dataclass(frozen=True)
class Case:
    """The training to measure."""

    model: str
    batch: int
    compile: bool
    amp: Amp
    image_size: int


@dataclass(frozen=True)
class Setting:
    """How to measure: ``rounds`` rounds of ``steps`` steps each way, after ``warmup`` steps.

    ``feeds`` holds the samples to stream by name: ``shards``, ``rendered``.
    """

    feeds: Mapping[str, SampleSource]
    classes: int
    workers: int
    rounds: int
    steps: int
    warmup: int


def bench(case: Case, setting: Setting, device: torch.device) -> dict[str, Any]:
    """Measure one case; rates are medians over the rounds, in images/s."""
    state = _build_state(case, setting.classes, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, 3, case.image_size, case.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, setting.classes, (case.batch,), generator=generator)
    resident = repeat(Batch(images.to(device), labels.to(device), (), np.zeros(case.batch, np.uint64), ()))

    def take(batches: Iterator[Batch], steps: int) -> tuple[float, float]:
        return _take(state, batches, steps, setting.classes, device)

    take(resident, setting.warmup)
    resident_rates = []
    feeds = {}
    for name, source in setting.feeds.items():
        with closing(_endless(source, case, setting.workers, device)) as streamed:
            take(streamed, 1)  # starts the workers
            for _ in range(setting.workers * _PREPARED):
                next(streamed)
            take(streamed, setting.warmup)
            rounds = [take(streamed, setting.steps) for _ in range(setting.rounds)]
        nearby = [take(resident, setting.steps)[0] for _ in range(setting.rounds)]
        resident_rates += nearby
        ratios = [rate / float(np.median(nearby)) for rate, _ in rounds]
        feeds[name] = {
            "images_per_s": round(float(np.median([rate for rate, _ in rounds])), 1),
            "share_of_resident": round(float(np.median(ratios)), 4),
            "share_of_resident_by_round": [round(ratio, 4) for ratio in ratios],
            "waiting": round(float(np.median([waiting for _, waiting in rounds])), 4),
        }
    resident_rates = resident_rates or [take(resident, setting.steps)[0] for _ in range(setting.rounds)]
    return {
        "precision": str(state.dtype).removeprefix("torch."),
        "resident_images_per_s": round(float(np.median(resident_rates)), 1),
        "feeds": feeds,
        "peak_memory_bytes": _peak_memory(device),
    }


def _build_state(case: Case, classes: int, device: torch.device) -> TrainState:
    torch.manual_seed(0)
    model = create_model(case.model, classes, case.image_size)
    alone = World(rank=0, size=1, local_rank=0, local_size=1, device=device)
    run = RunConfig(Path(), amp=case.amp, compile=case.compile)
    steps = 10**8  # the schedule outlasts the measurement
    return build_state(model, _RECIPE, run, multi_label=False, epoch_steps=steps, world=alone)


def _endless(source: SampleSource, case: Case, workers: int, device: torch.device) -> Generator[Batch, None, None]:
    """Yield batches without end, in epochs of many passes: the workers start once."""
    passes = max(_EPOCH_STEPS * case.batch // sum(source.lengths), 1)
    positions = training_positions(sum(source.lengths) * passes, case.batch, rank=0, world=1, pad=False)
    transform = train_transform(_RECIPE, case.image_size)
    pin_memory = device.type == "cuda"
    for epoch in count():
        order = epoch_order(source.lengths, 0, epoch, WINDOW, passes)
        yield from epoch_loader(source, transform, positions, order, 0, epoch, workers=workers, pin_memory=pin_memory)


def _take(
    state: TrainState, batches: Iterator[Batch], steps: int, classes: int, device: torch.device
) -> tuple[float, float]:
    """Take steps; return images/s, and the share of time spent waiting for batches."""
    waited = 0.0
    images_done = 0
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        images, labels = train_batch(batch, _RECIPE, classes, device)
        train_step(state, images, labels)
        images_done += len(images)
    _synchronize(device)
    seconds = time.perf_counter() - began
    return images_done / seconds, waited / seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _show(row: dict[str, Any]) -> str:
    title = f"{row['model']:<24}batch {row['batch']:<5}{'compiled' if row['compile'] else 'eager':<10}"
    if "error" in row:
        return f"{title}failed: {row['error']}"
    feeds = "".join(
        f"  {name} {feed['images_per_s']:>9,.1f} ({feed['share_of_resident']:.1%}, waiting {feed['waiting']:.1%})"
        for name, feed in row["feeds"].items()
    )
    return (
        f"{title}{row['precision']:<10}resident {row['resident_images_per_s']:>9,.1f} images/s{feeds}  "
        f"peak {human_bytes(row['peak_memory_bytes'])}"
    )


@click.command(help=__doc__.split("\n")[0] if __doc__ else None)
@click.option("--shards", type=click.Path(path_type=Path), help="Folder of a dataset.")
@click.option("--render", type=click.Path(path_type=Path), help="File of a recipe to render.")
@click.option("--model", "models", multiple=True, default=("resnet50", "deit_small_patch16_224"), show_default=True)
@click.option("--batch", "sizes", type=click.IntRange(1), multiple=True, default=(64, 256), show_default=True)
@click.option("--compile", "modes", type=click.Choice(["off", "on"]), multiple=True, default=("off", "on"),
              show_default=True)  # fmt: skip
@click.option("--amp", type=click.Choice(get_args(Amp)), default="auto", show_default=True)
@click.option("--image-size", type=click.IntRange(8), default=224, show_default=True)
@click.option("--workers", type=click.IntRange(0), default=12, show_default=True, help="Loader processes.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=50, show_default=True, help="Steps per round, each way.")
@click.option("--warmup", type=click.IntRange(0), default=20, show_default=True, help="Steps to warm up, each way.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the results to this JSON file.")
def main(
    shards: Path | None,
    render: Path | None,
    models: tuple[str, ...],
    sizes: tuple[int, ...],
    modes: tuple[str, ...],
    amp: Amp,
    image_size: int,
    workers: int,
    rounds: int,
    steps: int,
    warmup: int,
    out: Path | None,
) -> None:
    """Measure all cases."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    feeds: dict[str, StoredSplit | RenderedSplit] = {}
    if shards is not None:
        feeds["shards"] = StoredSplit(load_manifest(shards), "train")
    if render is not None:
        feeds["rendered"] = open_rendered(render)
    classes = max((feed.classes for feed in feeds.values()), default=1000)
    setting = Setting(feeds, classes, workers, rounds, steps, warmup)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    click.echo(f"{machine}, torch {torch.__version__}, {workers} loader workers")
    rows = []
    for mode, model, batch in product(modes, models, sizes):
        case = Case(model, batch, mode == "on", amp, image_size)
        row = {**asdict(case), "workers": workers}
        try:
            row |= bench(case, setting, device)
        except Exception as error:  # out of memory, no compiler: the other cases may work
            row["error"] = one_line(f"{type(error).__name__}: {error}")[:300]
        rows.append(row)
        click.echo(_show(row))
        if out is not None:
            write_json(out, {"device": machine, "torch": torch.__version__, "cases": rows}, indent=1)
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
