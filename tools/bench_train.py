"""Benchmark the data loading of the trainer: images/s from shards, compared with one batch that stays on the device.

    python tools/bench_train.py --shards shards/single --workers 12 --out bench.json

Both run in turn in the same process, with the training step of ``fractaltrain pt``, so their ratio is the cost of the
stream. Peak memory is that of the device on a GPU, and of this process on a CPU. Prints a line per model, batch size
and compilation mode.
"""

import platform
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import torch

from fractalshards.dataset import StoredSplit
from fractalshards.human import human_bytes
from fractalshards.manifest import load_manifest
from fractalshards.storage import write_json
from fractaltrain.config import Amp, RunConfig
from fractaltrain.distributed import World
from fractaltrain.models import create_model
from fractaltrain.recipes import PT_RECIPES
from fractaltrain.state import TrainState, build_state, train_step
from fractaltrain.stream.loader import Batch, epoch_loader
from fractaltrain.stream.order import epoch_order, training_positions
from fractaltrain.transforms import train_batch, train_transform

_WINDOW = 16  # shards, as pt shuffles them
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
    """How to measure: ``rounds`` rounds of ``steps`` steps each way, after ``warmup`` steps."""

    shards: Path
    workers: int
    rounds: int
    steps: int
    warmup: int


def bench(case: Case, setting: Setting, device: torch.device) -> dict[str, Any]:
    """Measure one case; rates are medians over the rounds, in images/s."""
    manifest = load_manifest(setting.shards)
    source = StoredSplit(manifest, "train")
    state = _build_state(case, manifest.classes, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, 3, case.image_size, case.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, manifest.classes, (case.batch,), generator=generator)
    resident = Batch(images.to(device), labels.to(device), (), np.zeros(case.batch, np.uint64), ())
    streamed = _endless(source, case, setting.workers, device)
    stays = (resident for _ in count())
    rates: dict[str, list[float]] = {"resident": [], "shards": []}
    waits: list[float] = []
    for batches in (stays, streamed):
        _take(state, batches, setting.warmup, manifest.classes, device)
    for _ in range(setting.rounds):
        rates["resident"].append(_take(state, stays, setting.steps, manifest.classes, device)[0])
        rate, waiting = _take(state, streamed, setting.steps, manifest.classes, device)
        rates["shards"].append(rate)
        waits.append(waiting)
    resident_rate, shards_rate = (float(np.median(rates[name])) for name in ("resident", "shards"))
    ratios = [ours / theirs for ours, theirs in zip(rates["shards"], rates["resident"], strict=True)]
    return {
        "model": case.model,
        "batch": case.batch,
        "compile": case.compile,
        "precision": str(state.dtype).removeprefix("torch."),
        "image_size": case.image_size,
        "workers": setting.workers,
        "resident_images_per_s": round(resident_rate, 1),
        "shards_images_per_s": round(shards_rate, 1),
        "share_of_resident": round(float(np.median(ratios)), 4),
        "share_of_resident_by_round": [round(ratio, 4) for ratio in ratios],
        "waiting": round(float(np.median(waits)), 4),
        "peak_memory_bytes": _peak_memory(device),
    }


def _build_state(case: Case, classes: int, device: torch.device) -> TrainState:
    torch.manual_seed(0)
    model = create_model(case.model, classes, case.image_size)
    alone = World(rank=0, size=1, local_rank=0, local_size=1, device=device)
    run = RunConfig(Path(), amp=case.amp, compile=case.compile)
    steps = 10**8  # the schedule outlasts the measurement
    return build_state(model, _RECIPE, run, multi_label=False, epoch_steps=steps, world=alone)


def _endless(source: StoredSplit, case: Case, workers: int, device: torch.device) -> Iterator[Batch]:
    """Yield the batches of one epoch after another, without end."""
    positions = training_positions(sum(source.lengths), case.batch, rank=0, world=1, pad=False)
    transform = train_transform(_RECIPE, case.image_size)
    for epoch in count():
        order = epoch_order(source.lengths, 0, epoch, _WINDOW)
        pin_memory = device.type == "cuda"
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
    mode = "compiled" if row["compile"] else "eager"
    return (
        f"{row['model']:<24}batch {row['batch']:<5}{row['precision']:<10}{mode:<10}"
        f"resident {row['resident_images_per_s']:>9,.1f}  shards {row['shards_images_per_s']:>9,.1f} images/s "
        f"({row['share_of_resident']:.1%})  waiting {row['waiting']:.1%}  peak {human_bytes(row['peak_memory_bytes'])}"
    )


@click.command(help=__doc__.split("\n")[0] if __doc__ else None)
@click.option("--shards", type=click.Path(path_type=Path), required=True, help="Folder of a dataset.")
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
    shards: Path,
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
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting(shards, workers, rounds, steps, warmup)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    click.echo(f"{machine}, torch {torch.__version__}, {workers} loader workers")
    rows = []
    for model, batch, mode in product(models, sizes, modes):
        rows.append(bench(Case(model, batch, mode == "on", amp, image_size), setting, device))
        click.echo(_show(rows[-1]))
    if out is not None:
        write_json(out, {"device": machine, "torch": torch.__version__, "cases": rows}, indent=1)


if __name__ == "__main__":
    main()
