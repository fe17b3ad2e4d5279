"""Benchmark the stream: decoding, batches compared with webdataset + Pillow, augmentation, memory of loader workers.

    python tools/bench_stream.py --json bench.json

Renders images of kind ``single`` first, unless ``--shards`` names a dataset. Each round runs all measurements in turn,
in one process with one thread. The table shows the CPU time of the best round, because other load only slows things
down. Loader workers are measured by wall-clock time.
"""

import io
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table

from fractalshards.dataset import StoredSplit
from fractalshards.manifest import Manifest, load_manifest
from fractalshards.png import decode_image
from fractalshards.reader import ShardIndex, index_split, iterate_shard
from fractalshards.storage import write_json
from fractaltrain.data.source import Images, SampleSource
from fractaltrain.recipes import PT_RECIPES
from fractaltrain.recipes.recipe import TrainRecipe, change
from fractaltrain.stream.loader import Batch, Transform, epoch_loader
from fractaltrain.stream.order import epoch_order, training_positions
from fractaltrain.transforms import train_batch, train_transform

_WINDOW = 16
_SHUFFLE = 1000  # samples in webdataset's buffer
_SOME = 100  # images whose decoding is timed
_MANY = 1_281_167  # images of ImageNet
_PLAIN = PT_RECIPES["anderson"]
_IN_WORKERS = {
    "resized crop and flip": "crop=resized,hflip=0.5",
    "random crop to 192": "crop=random",
    "affine": "augment=affine,hflip=0.5",
    "color jitter": "color_jitter=0.3",
    "RandAugment": "randaugment=9",
}
_ON_BATCHES = {"normalizing": "", "erasing": "erasing=0.25", "mixup or cutmix": "mixup=0.8,cutmix=1"}


@click.command()
@click.option("--shards", type=click.Path(path_type=Path), help="Folder of a dataset.  [default: rendered for this]")
@click.option("--images", default=4000, show_default=True, help="Images of the dataset to render.")
@click.option("--batch-size", default=64, show_default=True, type=click.IntRange(2))
@click.option("--batches", default=8, show_default=True, type=click.IntRange(1), help="Batches per round.")
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="Rounds to take the best of.")
@click.option("--workers", "counts", multiple=True, default=(1, 2), show_default=True, type=click.IntRange(1),
              help="Loader workers; may be repeated.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the results to this file.")
def main(
    shards: Path | None,
    images: int,
    batch_size: int,
    batches: int,
    rounds: int,
    counts: tuple[int, ...],
    json_path: Path | None,
) -> None:
    """Benchmark the stream on this machine."""
    torch.set_num_threads(1)
    with nullcontext(str(shards)) if shards else tempfile.TemporaryDirectory() as name:
        folder = Path(name) if shards else _render(Path(name) / "single", images)
        manifest = load_manifest(folder)
        report = {
            "decode_ms": _decoding(manifest, rounds),
            "images_per_second": _streaming(manifest, batch_size, batches, rounds, counts),
            "augmentation_ms": _augmenting(manifest, batch_size, rounds),
            "memory_mb": _memory(manifest, batch_size),
        }
    _print(report)
    if json_path:
        write_json(json_path, report, indent=1)


def _render(folder: Path, images: int) -> Path:
    command = "from fractalgen.cli import main; main()"
    options = ["--kind", "single", "--n", str(images), "--classes", "100", "--shard-size", "500", "--out", str(folder)]
    subprocess.run([sys.executable, "-c", command, "build", *options], check=True)
    return folder


def _decoding(manifest: Manifest, rounds: int) -> dict[str, float]:
    """Return the ms per image of each decoder."""
    samples = islice(iterate_shard(index_split(manifest, "train")[0]), _SOME)
    files = [data for sample in samples for extension, data in sample.files.items() if extension != "cls"]
    decoders: dict[str, Callable[[], object]] = {
        "ours": lambda: [decode_image(data) for data in files],
        "Pillow": lambda: [_decode_with_pillow(data) for data in files],
    }
    seconds = _take_turns(decoders, rounds)
    return {name: 1000 * time / len(files) for name, time in seconds.items()}


def _streaming(
    manifest: Manifest, batch_size: int, batches: int, rounds: int, counts: Sequence[int]
) -> dict[str, float]:
    """Return images per second: ours and webdataset in this process, and ours with loader workers."""
    source = StoredSplit(manifest, "train")
    images = batch_size * batches
    readers: dict[str, Callable[[], object]] = {
        "ours": lambda: _read(source, batch_size, batches),
        "webdataset + Pillow": lambda: _read_with_webdataset(manifest, batch_size, batches),
    }
    rates = {name: images / time for name, time in _take_turns(readers, rounds).items()}
    for count in counts:
        rates[f"ours, {count} loader workers"] = max(_rate(source, batch_size, batches, count) for _ in range(rounds))
    return rates


def _augmenting(manifest: Manifest, batch_size: int, rounds: int) -> dict[str, float]:
    """Return ms per image of augmentation on one core: for single images, and for normalized batches."""
    batch = next(_batches(StoredSplit(manifest, "train"), batch_size, 1, workers=0))
    images = [np.ascontiguousarray(image.permute(1, 2, 0).numpy()) for image in batch.images]
    parts: dict[str, Callable[[], object]] = {}
    for name, fields in _IN_WORKERS.items():
        transform = train_transform(_recipe(fields), 192 if "192" in name else 224)
        parts[name] = partial(_apply, transform, images)
    for name, fields in _ON_BATCHES.items():
        parts[f"batch: {name}"] = partial(train_batch, batch, _recipe(fields), manifest.classes, torch.device("cpu"))
    return {name: 1000 * spent / batch_size for name, spent in _take_turns(parts, rounds).items()}


def _recipe(fields: str) -> TrainRecipe:
    return change(_PLAIN, dict(field.split("=") for field in fields.split(",") if field))


def _apply(transform: Transform, images: Sequence[Images]) -> None:
    for key, image in enumerate(images):
        transform(image, key)


def _memory(manifest: Manifest, batch_size: int) -> dict[str, float]:
    """Return the MB of a loader worker, for this dataset and for one of over a million images."""
    figures = {}
    for name, source in (("this dataset", StoredSplit(manifest, "train")), (f"{_MANY:,} images", _Many(manifest))):
        order = epoch_order(source.lengths, 0, 0, _WINDOW)
        positions = training_positions(len(order), batch_size, 0, 1, pad=False)
        with closing(epoch_loader(source, train_transform(_PLAIN, 224), positions, order, 0, 0, workers=2)) as loader:
            for _ in islice(loader, min(40, len(positions) - 1)):
                pass
            pids = [child.pid for child in multiprocessing.active_children() if child.pid]
            figures[f"worker, {name}: peak, including shared pages"] = max(_status(pid, "VmHWM") for pid in pids)
            figures[f"worker, {name}: private"] = max(_private(pid) for pid in pids)
    return figures


class _Many(StoredSplit):
    """The shards of a dataset repeated to as many images as ImageNet has, each with its own index."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest, "train")
        times = -(-_MANY // sum(self.lengths))
        shards = self._shards * times
        self._shards = tuple(ShardIndex(shard.path, shard.offsets.copy()) for shard in shards)
        self._starts = np.cumsum([0, *self.lengths])


def _read(source: SampleSource, batch_size: int, batches: int) -> None:
    """Read ``batches`` batches of an epoch."""
    for _ in _batches(source, batch_size, batches, workers=0):
        pass


def _rate(source: SampleSource, batch_size: int, batches: int, workers: int) -> float:
    """Return the images per second from loader workers, once they have started and their queues are full."""
    warm = 8 * workers
    stream = _batches(source, batch_size, warm + batches * workers, workers)
    for _ in islice(stream, warm):
        pass
    start = time.perf_counter()
    images = sum(len(batch.keys) for batch in stream)
    return images / (time.perf_counter() - start)


def _batches(source: SampleSource, batch_size: int, batches: int, workers: int) -> Iterator[Batch]:
    order = epoch_order(source.lengths, 0, 0, _WINDOW)
    positions = np.arange(batch_size * batches).reshape(batches, batch_size)
    return epoch_loader(source, train_transform(_PLAIN, 224), positions, order, 0, 0, workers=workers)


def _read_with_webdataset(manifest: Manifest, batch_size: int, batches: int) -> None:
    """Read the same number of shuffled uint8 batches with webdataset and Pillow."""
    urls = [str(manifest.folder / shard.name) for shard in manifest.splits["train"]]
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(_SHUFFLE, initial=1)
    loaded = dataset.decode("rgb8").to_tuple("png", "cls").batched(batch_size)
    for images, _ in islice(loaded, batches):
        torch.as_tensor(images)


def _decode_with_pillow(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _take_turns(parts: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the seconds of CPU time of each part in its best round, after one round to warm up."""
    best = dict.fromkeys(parts, float("inf"))
    for number in range(rounds + 1):
        for name, part in parts.items():
            start = time.process_time()
            part()
            if number:
                best[name] = min(best[name], time.process_time() - start)
    return best


def _status(pid: int, field: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _private(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) / 1024 for line in lines if line.startswith("Private"))


def _print(report: dict[str, dict[str, float]]) -> None:
    table = Table("measurement", "result")
    decode, rates = report["decode_ms"], report["images_per_second"]
    for name, value in decode.items():
        table.add_row(f"decoding, {name}", f"{value:.3f} ms per image")
    table.add_row("Pillow's time over ours", f"{decode['Pillow'] / decode['ours']:.2f}", end_section=True)
    for name, value in rates.items():
        table.add_row(f"shards to uint8 batches, {name}", f"{value:,.0f} images/s")
    table.add_row("ours over webdataset", f"{rates['ours'] / rates['webdataset + Pillow']:.2f}", end_section=True)
    for name, value in report["augmentation_ms"].items():
        table.add_row(name, f"{value:.3f} ms per image")
    table.add_section()
    for name, value in report["memory_mb"].items():
        table.add_row(name, f"{value:,.0f} MB")
    Console().print(table)


if __name__ == "__main__":
    main()
