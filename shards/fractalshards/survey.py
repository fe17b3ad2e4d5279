"""Survey a dataset: images per class, some images of every class, and statistics of evenly spread images."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from fractalshards.errors import FractalError
from fractalshards.manifest import MAX_SAMPLES, TRAINING, Manifest
from fractalshards.png import Pixels
from fractalshards.reader import ShardIndex, count_labels, decode_shard, index_split, read_blocks
from fractalshards.sample import (
    Label,
    MultiLabel,
    Object,
    classes_of,
    decode_label,
    label_extension,
    packed_size,
    scan_members,
)
from fractalshards.workers import OnProgress, no_progress, worker_pool

MAX_MEASURED = 2000  # images
MAX_THUMBNAILS = 4000
MAX_THUMBNAIL_BYTES = 5_000_000  # of all together; base64 makes 6.7 MB of them
_PER_CLASS = 8
_LARGE, _SMALL = 96, 64  # pixels of a thumbnail
_MAX_LARGE = 800  # with more thumbnails, they are small
_MAX_OBJECTS = 8  # boxes per thumbnail
_GOLDEN = 0.6180339887498949

Counts = npt.NDArray[np.int64]  # images that show each class, (classes,)


@dataclass(frozen=True)
class Thumbnail:
    """A small WebP picture of a sample, the size of the full image in pixels, and its first objects."""

    key: str
    width: int
    height: int
    webp: bytes
    objects: tuple[Object, ...]


class ImageStats(NamedTuple):
    """Statistics of one image."""

    width: int
    height: int
    bytes: int  # of the sample in its tar, with headers
    fill: float  # share of pixels that are not black; FractalDB's fill rate
    objects: int  # in the label; 0 for label type ``single``


@dataclass(frozen=True)
class Survey:
    """The survey of a dataset."""

    manifest: Manifest
    split: str  # that of thumbnails and statistics: ``train``, or the first one
    counts: Mapping[str, Counts]  # by split; exact
    thumbnails: Mapping[int, Sequence[Thumbnail]]  # by class: of all classes, or evenly spread ones
    tile: int  # pixels that a thumbnail fits into
    stats: Sequence[ImageStats]  # of evenly spread images


def survey_dataset(manifest: Manifest, workers: int, on_progress: OnProgress = no_progress) -> Survey:
    """Survey a dataset with ``workers`` processes.

    Reads all sidecars, and of the tars only what it shows or measures. ``on_progress`` is called with images read and
    images to read. Raises FractalError if there is no image, or a sidecar or sample is damaged.
    """
    split = TRAINING if TRAINING in manifest.splits else next(iter(manifest.splits), "")
    if not split or not 0 < manifest.samples(split) <= MAX_SAMPLES:
        raise FractalError(f"{manifest.folder}: contains no images, or too many; build or fetch it again")
    shown = spread(manifest.classes, MAX_THUMBNAILS)
    per_class = min(_PER_CLASS, MAX_THUMBNAILS // len(shown))
    tile = _LARGE if len(shown) * per_class <= _MAX_LARGE else _SMALL
    wanted = select_samples(manifest, split, shown, per_class)
    measured = np.array(spread(manifest.samples(split), MAX_MEASURED))
    tasks = []
    first = 0
    for number, index in enumerate(index_split(manifest, split)):
        end = first + len(index.offsets) - 1
        positions = (measured[(measured >= first) & (measured < end)] - first).tolist()
        if number in wanted or positions:
            tasks.append((index, wanted.get(number, {}), positions))
        first = end
    done, total = 0, len(measured) + sum(sum(classes.values()) for classes in wanted.values())
    thumbnails: dict[int, list[Thumbnail]] = {label: [] for label in shown}
    stats: list[ImageStats] = []
    with worker_pool(workers) as pool:
        for pictures, measurements in pool.map(partial(_survey_shard, manifest.classes, tile), tasks):
            for label, picture in pictures:
                thumbnails[label].append(picture)
            stats += measurements
            done += len(pictures) + len(measurements)
            on_progress(done, total)
    none = np.zeros(manifest.classes, np.int64)
    counts = {name: sum(count_labels(manifest, name), start=none) for name in manifest.splits}
    return Survey(manifest, split, counts, fit_thumbnails(thumbnails, MAX_THUMBNAIL_BYTES), tile, stats)


def spread(total: int, most: int) -> list[int]:
    """Return ``range(total)``, or ``most`` of it evenly spread."""
    return [int(value) for value in np.linspace(0, total - 1, min(total, most)).round()]


def fit_thumbnails(thumbnails: Mapping[int, list[Thumbnail]], most_bytes: int) -> dict[int, list[Thumbnail]]:
    """Keep the same number of thumbnails of every class, as many as fit into ``most_bytes`` together, perhaps none."""
    keep = max(map(len, thumbnails.values()), default=0)
    while keep and sum(len(one.webp) for found in thumbnails.values() for one in found[:keep]) > most_bytes:
        keep -= 1
    return {label: found[:keep] for label, found in thumbnails.items()}


def select_samples(manifest: Manifest, split: str, shown: Sequence[int], per_class: int) -> dict[int, dict[int, int]]:
    """Choose how many images of each class to take from which shards, by the label counts in the sidecars.

    The images of a class come from as many shards as possible, because one shard may hold one render in four flips.
    Returns the number of images to take by shard and class.
    """
    classes, kind = np.array(shown), np.min_scalar_type(per_class)
    rows = (np.minimum(counts[classes], per_class).astype(kind) for counts in count_labels(manifest, split))
    available = np.fromiter(rows, np.dtype((kind, (len(classes),))))
    missing = np.minimum(available.sum(axis=0), per_class).astype(np.int64)
    taken = np.zeros_like(available)
    order = sorted(range(len(available)), key=lambda number: number * _GOLDEN % 1)  # every prefix is evenly spread
    for number in order * per_class:  # one image per class at a time
        take = (available[number] > taken[number]) & (missing > 0)
        taken[number] += take
        missing -= take
        if not missing.any():
            break
    return {
        int(number): {shown[at]: int(taken[number, at]) for at in np.flatnonzero(taken[number]).tolist()}
        for number in np.flatnonzero(taken.sum(axis=1))
    }


def choose_samples(index: ShardIndex, counts: Mapping[int, int]) -> list[tuple[int, int]]:
    """Choose a number of samples of each class from a shard, evenly spread; return (class, position) of each."""
    positions: dict[int, list[int]] = {label: [] for label in counts}
    for position, label in enumerate(_read_labels(index) if counts else ()):
        for one in classes_of(label):
            if one in positions:
                positions[one].append(position)
    return [(label, found[at]) for label, found in positions.items() for at in spread(len(found), counts[label])]


def shrink(image: Pixels, tile: int) -> Image.Image:
    """Shrink an image to fit into ``tile`` x ``tile`` pixels, keeping its shape; a smaller image stays as it is."""
    picture = Image.fromarray(image)
    picture.thumbnail((tile, tile), Image.Resampling.LANCZOS)
    return picture


def _survey_shard(
    classes: int, tile: int, task: tuple[ShardIndex, Mapping[int, int], Sequence[int]]
) -> tuple[list[tuple[int, Thumbnail]], list[ImageStats]]:
    """Return (class, thumbnail) of the wanted number of images of each class, and statistics of images by position."""
    index, counts, measured = task
    chosen = choose_samples(index, counts)
    shown = {position for _, position in chosen}
    positions = sorted({*measured, *shown})
    thumbnails: dict[int, Thumbnail] = {}
    stats: dict[int, ImageStats] = {}
    for position, (sample, image, label) in zip(positions, decode_shard(index, classes, positions), strict=True):
        height, width, _ = image.shape
        objects = label.objects if isinstance(label, MultiLabel) else ()
        stats[position] = ImageStats(width, height, packed_size(sample), float(image.any(axis=2).mean()), len(objects))
        if position in shown:
            stream = io.BytesIO()
            shrink(image, tile).save(stream, "WEBP", quality=75)
            thumbnails[position] = Thumbnail(sample.key, width, height, stream.getvalue(), objects[:_MAX_OBJECTS])
    return [(label, thumbnails[position]) for label, position in chosen], [stats[position] for position in measured]


def _read_labels(index: ShardIndex) -> Iterator[Label]:
    """Read the labels of a shard without the images."""
    with index.path.open("rb") as file:
        for position, (start, end) in enumerate(pairwise(index.offsets.tolist())):
            try:
                members = {m.name.partition(".")[2]: m for m in scan_members(file.fileno(), start, end)}
                label = members[extension := label_extension(members)]
                yield decode_label({extension: read_blocks(file.fileno(), label.start, label.start + label.size)})
            except FractalError as error:
                text = f"{index.path}: sample {position}: {error}; fetch or build it again"
                raise FractalError(text) from error
