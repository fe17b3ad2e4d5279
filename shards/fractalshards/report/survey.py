"""A survey of a dataset for its report: exact label counts, thumbnails of every class, measures of a bounded sample."""

from collections.abc import Iterator, Mapping
from concurrent.futures import as_completed
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fractalshards.console import progress
from fractalshards.errors import FractalError
from fractalshards.files import regular_size
from fractalshards.manifest import MAX_SAMPLES, Manifest, Shard, read_record
from fractalshards.names import TRAINING
from fractalshards.reader import ShardIndex
from fractalshards.report.looks import Look, LookTask, ShardLooks, Thumbnail, look_at_shard
from fractalshards.workers import worker_pool

MAX_LOOKS = 2000  # images measured
MAX_THUMBNAILS = 4000
MAX_THUMBNAIL_BYTES = 5_000_000  # of all together; base64 makes 6.7 MB of them
_PER_CLASS = 8
_LARGE, _SMALL = 96, 64  # pixels of a thumbnail
_MAX_LARGE = 800  # so many thumbnails are large
_GOLDEN = 0.6180339887498949

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassView:
    """A class: its index, how many images of the surveyed split show it, and a few of them."""

    index: int
    count: int
    thumbnails: tuple[Thumbnail, ...]


@dataclass(frozen=True)
class Survey:
    """What was seen of a dataset.

    Attributes:
        split: the one that thumbnails and measures are from: ``train``, or the first.
        label_counts: images that show each class, (classes,) int64, by split; exact.
        views: the classes shown, all of them up to ``MAX_THUMBNAILS``, else evenly spread ones.
        looks: measures of up to ``MAX_LOOKS`` images, evenly spread.
        tile: pixels that a thumbnail fits into.
    """

    manifest: Manifest
    split: str
    label_counts: Mapping[str, Counts]
    views: tuple[ClassView, ...]
    looks: tuple[Look, ...]
    tile: int


def survey_dataset(manifest: Manifest, workers: int) -> Survey:
    """Survey a dataset, with progress on stderr.

    Reads all sidecars, the labels of as many shards as it takes to find images of every class, and the images it
    shows or measures.

    Raises:
        FractalError: if there is no image, or a sidecar or sample is damaged.
        OSError: if a file cannot be read.
    """
    split = TRAINING if TRAINING in manifest.splits else next(iter(manifest.splits), "")
    if not split or not manifest.samples(split):
        raise FractalError(f"{manifest.folder}: no image in it, so there is nothing to report; build or fetch it again")
    if manifest.samples(split) > MAX_SAMPLES:
        raise FractalError(f"{manifest.folder}: more samples than keys of nine digits; fetch or build it again")
    shown = spread(manifest.classes, MAX_THUMBNAILS)
    per_class = min(_PER_CLASS, MAX_THUMBNAILS // len(shown))
    tile = _LARGE if len(shown) * per_class <= _MAX_LARGE else _SMALL
    plan = _Plan(manifest, split, shown, per_class, tile)
    label_counts = _read_sidecars(manifest, plan)
    found = _run(plan.tasks(), workers)
    thumbnails: dict[int, list[Thumbnail]] = {label: [] for label in shown}
    for taken in found:
        for label, thumbnail in taken.thumbnails:
            thumbnails[label].append(thumbnail)
    counts = label_counts[split]
    views = tuple(ClassView(label, int(counts[label]), tuple(thumbnails[label])) for label in shown)
    looks = tuple(look for taken in found for look in taken.looks)
    return Survey(manifest, split, label_counts, fit_thumbnails(views, MAX_THUMBNAIL_BYTES), looks, tile)


def spread(total: int, most: int) -> list[int]:
    """All of ``0 .. total - 1``, or ``most`` of them evenly spread, first and last included."""
    return [int(value) for value in np.linspace(0, total - 1, min(total, most)).round()]


def fit_thumbnails(views: tuple[ClassView, ...], most_bytes: int) -> tuple[ClassView, ...]:
    """The views with as many thumbnails of each class as fit into so many bytes together; perhaps none."""
    keep = max((len(view.thumbnails) for view in views), default=0)
    while keep and sum(len(one.webp) for view in views for one in view.thumbnails[:keep]) > most_bytes:
        keep -= 1
    return tuple(replace(view, thumbnails=view.thumbnails[:keep]) for view in views)


class _Plan:
    """Decides, shard by shard, what to take from each, until every class has its thumbnails."""

    def __init__(self, manifest: Manifest, split: str, shown: list[int], per_class: int, tile: int) -> None:
        self.split = split
        self.missing = dict.fromkeys(shown, per_class)
        self._manifest = manifest
        self.per_class = per_class
        self._tile = tile
        samples = np.array([shard.samples for shard in manifest.splits[split]], np.int64)
        self._firsts = np.cumsum(samples) - samples
        self._looked = np.array(spread(int(samples.sum()), MAX_LOOKS))
        self._tasks: dict[int, LookTask] = {}

    def add(self, number: int, index: ShardIndex, counts: Counts, most: int) -> None:
        """Take what is needed from the shard with this number, whose classes are counted: so many of each at most."""
        task = self._tasks.get(number) or LookTask(index, {}, self._inside(number), self._manifest.classes, self._tile)
        wanted = dict(task.wanted)
        for label, missing in list(self.missing.items()):
            if count := min(missing, most, int(counts[label]) - wanted.get(label, 0)):
                wanted[label] = wanted.get(label, 0) + count
                self._found(label, count)
        self._tasks[number] = replace(task, wanted=wanted)

    def limit(self, counts: Counts) -> None:
        """Miss no more of a class than there is."""
        for label in list(self.missing):
            self._found(label, max(self.per_class - int(counts[label]), 0))

    def tasks(self) -> list[LookTask]:
        """What there is to do, in order of shards."""
        tasks = (self._tasks[number] for number in sorted(self._tasks))
        return [task for task in tasks if task.wanted or task.looked]

    def _found(self, label: int, count: int) -> None:
        self.missing[label] -= count
        if not self.missing[label]:
            del self.missing[label]

    def _inside(self, number: int) -> list[int]:
        """The positions of the samples to measure in a shard."""
        inside = self._looked - self._firsts[number]
        found: list[int] = inside[(inside >= 0) & (inside < self._manifest.splits[self.split][number].samples)].tolist()
        return found


def _read_sidecars(manifest: Manifest, plan: _Plan) -> dict[str, Counts]:
    """Count the labels of every split from the sidecars, and make the plan from those of its split.

    Images of a class are taken from many shards where that is possible, for a shard may hold one render in four flips.
    Only where too few are found so, as in shards that do not mix classes, sidecars are read again.
    """
    label_counts = {split: np.zeros(manifest.classes, np.int64) for split in manifest.splits}
    from_shard = -(-plan.per_class // len(manifest.splits[plan.split]))
    with progress("reading sidecars", sum(map(len, manifest.splits.values())), "shards") as advance:
        for split, number, shard in _scattered(manifest):
            index, counts = _read_sidecar(manifest, shard)
            label_counts[split] += counts
            if split == plan.split:
                plan.add(number, index, counts, from_shard)
            advance(1)
    plan.limit(label_counts[plan.split])
    for split, number, shard in _scattered(manifest):
        if plan.missing and split == plan.split:
            plan.add(number, *_read_sidecar(manifest, shard), plan.per_class)
    return label_counts


def _read_sidecar(manifest: Manifest, shard: Shard) -> tuple[ShardIndex, Counts]:
    path = manifest.folder / shard.name
    record = read_record(manifest.folder, shard.name, manifest.label_type)
    if record.shard() != shard or len(record.label_counts) != manifest.classes:
        raise FractalError(f"{path}: its sidecar and the manifest disagree; fetch or build it again")
    if (size := regular_size(path)) != record.bytes:
        raise FractalError(f"{path}: {size} bytes instead of {record.bytes}; fetch or build it again")
    return ShardIndex(path, np.array(record.offsets, np.int64)), np.array(record.label_counts, np.int64)


def _scattered(manifest: Manifest) -> Iterator[tuple[str, int, Shard]]:
    """All shards, those of a split in an order of which every beginning is spread evenly."""
    for split, shards in manifest.splits.items():
        for number in sorted(range(len(shards)), key=lambda number: number * _GOLDEN % 1):
            yield split, number, shards[number]


def _run(tasks: list[LookTask], workers: int) -> list[ShardLooks]:
    """What the tasks give, in their order."""
    images = sum(len(task.looked) + sum(task.wanted.values()) for task in tasks)
    with progress("looking", images, "images") as advance, worker_pool(workers) as pool:
        futures = {pool.submit(look_at_shard, task): task for task in tasks}
        for future in as_completed(futures):
            task = futures[future]
            future.result()
            advance(len(task.looked) + sum(task.wanted.values()))
    return [future.result() for future in futures]
