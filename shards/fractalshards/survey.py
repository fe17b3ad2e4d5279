"""Survey a dataset: images per class, a few images of every class, statistics of images spread over the dataset."""

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from fractalshards.errors import FractalError
from fractalshards.manifest import MAX_SAMPLES, TRAINING, Manifest, Shard, read_record, split_shards
from fractalshards.png import Pixels
from fractalshards.reader import ShardIndex, decode_sample, read_sample
from fractalshards.sample import BLOCK, Label, MultiLabel, Object, classes_of, decode_label, first_member_end
from fractalshards.storage import regular_size
from fractalshards.workers import OnProgress, no_progress, worker_pool

MAX_MEASURED = 2000  # images
MAX_THUMBNAILS = 4000
MAX_THUMBNAIL_BYTES = 5_000_000  # of all together; base64 makes 6.7 MB of them
DETAIL = 32  # of 255: the difference between neighbours that counts as detail
_PER_CLASS = 8
_LARGE, _SMALL = 96, 64  # pixels of a thumbnail
_MAX_LARGE = 800  # with more thumbnails, they are small
_MAX_OBJECTS = 8  # boxes per thumbnail
_GOLDEN = 0.6180339887498949

Counts = npt.NDArray[np.int64]  # images that show each class, (classes,)


class Location(NamedTuple):
    """Where a sample is: its position in the shard ``path``, and its bytes."""

    path: Path
    position: int
    start: int
    end: int


@dataclass(frozen=True)
class Thumbnail:
    """A small WebP picture of a sample, the size of its image in pixels, and the first objects in it."""

    key: str
    width: int
    height: int
    webp: bytes
    objects: tuple[Object, ...]


@dataclass(frozen=True)
class ImageStats:
    """Statistics of one image.

    Attributes:
        bytes: size of the sample in its tar, with headers.
        fill: share of pixels that are not black; FractalDB's fill rate.
        detail: share of pixels that differ from one of their four neighbours by more than ``DETAIL`` in a channel.
        objects: number of objects in the label; 0 for label type ``single``.
        covered: share of the image that lies in the box of an object.
    """

    width: int
    height: int
    bytes: int
    fill: float
    detail: float
    objects: int
    covered: float


@dataclass(frozen=True)
class Survey:
    """The survey of a dataset.

    Attributes:
        split: the split of thumbnails and statistics: ``train``, or the first one.
        counts: images that show each class, (classes,) int64, by split; exact.
        thumbnails: by class: of all classes, or ``MAX_THUMBNAILS`` evenly spread ones.
        tile: pixels that a thumbnail fits into.
        stats: statistics of up to ``MAX_MEASURED`` images, evenly spread.
    """

    manifest: Manifest
    split: str
    counts: Mapping[str, Counts]
    thumbnails: Mapping[int, Sequence[Thumbnail]]
    tile: int
    stats: Sequence[ImageStats]


def survey_dataset(manifest: Manifest, workers: int, on_progress: OnProgress = no_progress) -> Survey:
    """Survey a dataset with ``workers`` processes.

    Reads all sidecars, the labels of as many shards as it takes to find images of every class, and the images that it
    shows or measures.

    Args:
        on_progress: called with images read and images to read.

    Raises:
        FractalError: if there is no image, or a sidecar or sample is damaged.
        OSError: if a file cannot be read.
    """
    split = TRAINING if TRAINING in manifest.splits else next(iter(manifest.splits), "")
    if not split or not 0 < manifest.samples(split) <= MAX_SAMPLES:
        raise FractalError(f"{manifest.folder}: contains no image, or too many; build or fetch it again")
    shown = spread(manifest.classes, MAX_THUMBNAILS)
    per_class = min(_PER_CLASS, MAX_THUMBNAILS // len(shown))
    tile = _LARGE if len(shown) * per_class <= _MAX_LARGE else _SMALL
    wanted, counts = select_samples(manifest, split, shown, per_class)
    measured = list(_spread_over_shards(manifest, split))
    thumbnails: dict[int, list[Thumbnail]] = {label: [] for label in shown}
    stats = []
    with worker_pool(workers) as pool:
        chosen = [place for places in pool.map(choose_samples, wanted) for place in places]
        total = len(chosen) + len(measured)
        for done, (label, thumbnail) in enumerate(pool.map(partial(_thumbnail, manifest.classes, tile), chosen), 1):
            thumbnails[label].append(thumbnail)
            on_progress(done, total)
        for done, one in enumerate(pool.map(partial(_stats, manifest.classes), measured), len(chosen) + 1):
            stats.append(one)
            on_progress(done, total)
    others = {name: _count_labels(manifest, name) for name in manifest.splits if name != split}
    fitting = fit_thumbnails(thumbnails, MAX_THUMBNAIL_BYTES)
    return Survey(manifest, split, {split: counts, **others}, fitting, tile, stats)


def spread(total: int, most: int) -> list[int]:
    """Return ``range(total)``, or ``most`` of it evenly spread."""
    return [int(value) for value in np.linspace(0, total - 1, min(total, most)).round()]


def fit_thumbnails(thumbnails: Mapping[int, list[Thumbnail]], most_bytes: int) -> dict[int, list[Thumbnail]]:
    """Keep as many thumbnails of each class as fit into so many bytes together; perhaps none."""
    keep = max(map(len, thumbnails.values()), default=0)
    while keep and sum(len(one.webp) for found in thumbnails.values() for one in found[:keep]) > most_bytes:
        keep -= 1
    return {label: found[:keep] for label, found in thumbnails.items()}


def select_samples(
    manifest: Manifest, split: str, shown: Sequence[int], per_class: int
) -> tuple[list[tuple[ShardIndex, dict[int, int]]], Counts]:
    """Choose how many images of each class to take from which shards, by the label counts in all sidecars.

    The images of a class come from as many shards as possible, because one shard may hold one render in four flips.

    Returns:
        Shards and the number of images to take from each by class, and the label counts of the split.

    Raises:
        FractalError: if there is no such split, or a sidecar is damaged.
    """
    shards = split_shards(manifest, split)
    order = sorted(range(len(shards)), key=lambda number: number * _GOLDEN % 1)  # any first part is evenly spread
    classes = np.array(shown)
    totals = np.zeros(manifest.classes, np.int64)
    missing = np.full(len(classes), per_class)
    taken: dict[int, tuple[ShardIndex, Counts]] = {}
    for again, most in ((False, -(-per_class // max(len(shards), 1))), (True, per_class)):
        for number in order:
            if again and not missing.any():
                break  # as in most datasets: those that mix classes
            index, counts = read_index(manifest, shards[number])
            totals += 0 if again else counts
            before = taken[number][1] if number in taken else np.zeros_like(missing)
            take = np.minimum(np.minimum(missing, most), counts[classes] - before)
            if take.any():
                taken[number] = index, before + take
                missing -= take
        missing = np.minimum(missing, totals[classes] - (per_class - missing))
    wanted = [(index, {int(classes[at]): int(take[at]) for at in take.nonzero()[0]}) for index, take in taken.values()]
    return wanted, totals


def choose_samples(wanted: tuple[ShardIndex, Mapping[int, int]]) -> list[tuple[int, Location]]:
    """Choose samples of a shard, so many of each class, evenly spread; returns them with their classes.

    Raises:
        FractalError: if a label is damaged.
        OSError: if the shard cannot be read.
    """
    index, counts = wanted
    locations: dict[int, list[Location]] = {label: [] for label in counts}
    for location, label in _read_labels(index):
        for one in classes_of(label):
            if one in locations:
                locations[one].append(location)
    return [(label, found[at]) for label, found in locations.items() for at in spread(len(found), counts[label])]


def read_image(location: Location, classes: int) -> tuple[str, Pixels, Label]:
    """Read key, image (H, W, 3) uint8 and label of a sample.

    Raises:
        FractalError: if the sample is damaged, naming it.
        OSError: if the shard cannot be read.
    """
    with location.path.open("rb") as file, _naming(location):
        sample = read_sample(file.fileno(), location.start, location.end)
        return sample.key, *decode_sample(sample, classes)


def shrink(image: Pixels, tile: int) -> Image.Image:
    """Shrink an image to fit into ``tile`` x ``tile`` pixels, keeping its shape; a smaller image stays as it is."""
    picture = Image.fromarray(image)
    picture.thumbnail((tile, tile), Image.Resampling.LANCZOS)
    return picture


def measure(image: Pixels, label: Label, size: int) -> ImageStats:
    """Compute the statistics of an image (H, W, 3) uint8 whose sample takes ``size`` bytes."""
    height, width, _ = image.shape
    objects = label.objects if isinstance(label, MultiLabel) else ()
    covered = np.zeros((height, width), bool)
    for thing in objects:
        x, y, box_width, box_height = thing.bbox
        covered[y : y + box_height, x : x + box_width] = True
    return ImageStats(
        width=width,
        height=height,
        bytes=size,
        fill=float(image.any(axis=2).mean()),
        detail=float(_mark_detail(image).mean()),
        objects=len(objects),
        covered=float(covered.mean()),
    )


def _mark_detail(image: Pixels) -> npt.NDArray[np.bool_]:
    """Mark the pixels that differ from a neighbour, (H, W) bool."""
    found = np.zeros(image.shape[:2], np.bool_)
    for axis in (0, 1):
        rows, along = np.moveaxis(image, axis, 0), np.moveaxis(found, axis, 0)
        before, after = rows[:-1], rows[1:]  # a difference of wider integers would take twice the memory of an image
        steps = (np.maximum(before, after) - np.minimum(before, after) > DETAIL).any(axis=2)
        along[1:] |= steps
        along[:-1] |= steps
    return found


def _thumbnail(classes: int, tile: int, chosen: tuple[int, Location]) -> tuple[int, Thumbnail]:
    label, location = chosen
    key, image, content = read_image(location, classes)
    height, width, _ = image.shape
    stream = io.BytesIO()
    shrink(image, tile).save(stream, "WEBP", quality=75)
    objects = content.objects[:_MAX_OBJECTS] if isinstance(content, MultiLabel) else ()
    return label, Thumbnail(key, width, height, stream.getvalue(), objects)


def _stats(classes: int, location: Location) -> ImageStats:
    _, image, label = read_image(location, classes)
    return measure(image, label, location.end - location.start)


def _spread_over_shards(manifest: Manifest, split: str) -> Iterator[Location]:
    """Yield the samples to measure."""
    shards = manifest.splits[split]
    ends = np.cumsum([shard.samples for shard in shards])
    samples = np.array(spread(int(ends[-1]), MAX_MEASURED))
    numbers = np.searchsorted(ends, samples, side="right")
    for number in np.unique(numbers).tolist():
        index, _ = read_index(manifest, shards[number])
        for position in (samples[numbers == number] - ends[number] + shards[number].samples).tolist():
            yield _locate(index, position)


def _count_labels(manifest: Manifest, split: str) -> Counts:
    counts = np.zeros(manifest.classes, np.int64)
    for shard in manifest.splits[split]:
        counts += read_index(manifest, shard)[1]
    return counts


def read_index(manifest: Manifest, shard: Shard) -> tuple[ShardIndex, Counts]:
    """Read a shard's sidecar: where its samples are, and its label counts.

    Raises:
        FractalError: if sidecar, manifest and file disagree.
        OSError: if the sidecar cannot be read.
    """
    path = manifest.folder / shard.name
    record = read_record(manifest.folder, shard.name, manifest.label_type)
    if record.shard() != shard or len(record.label_counts) != manifest.classes:
        raise FractalError(f"{path}: its sidecar and the manifest disagree; fetch or build it again")
    if (size := regular_size(path)) != record.bytes:
        raise FractalError(f"{path}: {size} bytes instead of {record.bytes}; fetch or build it again")
    return ShardIndex(path, np.array(record.offsets, np.int64)), np.array(record.label_counts, np.int64)


def _locate(index: ShardIndex, position: int) -> Location:
    start, end = index.offsets[position : position + 2].tolist()
    return Location(index.path, position, start, end)


@contextmanager
def _naming(location: Location) -> Iterator[None]:
    """Add shard and position to errors about a sample."""
    try:
        yield
    except FractalError as error:
        raise FractalError(f"{location.path}: sample {location.position}: {error}; fetch or build it again") from error


def _read_labels(index: ShardIndex) -> Iterator[tuple[Location, Label]]:
    """Read the labels of a shard, without the images where they come first, as in our shards."""
    with index.path.open("rb") as file:
        for position in range(len(index.offsets) - 1):
            location = _locate(index, position)
            with _naming(location):
                second = location.start + first_member_end(os.pread(file.fileno(), BLOCK, location.start))
                start = second if second < location.end else location.start
                files = read_sample(file.fileno(), start, location.end).files
                if len(files) > 1 or files.keys().isdisjoint(("cls", "json")):
                    files = read_sample(file.fileno(), location.start, location.end).files
                label = decode_label(files)
            yield location, label
