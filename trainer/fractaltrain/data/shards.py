"""Samples of a dataset of shards: one pread per sample, wherever the sidecars say it lies."""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fractalshards.console import progress
from fractalshards.errors import FractalError, describe_os_error
from fractalshards.manifest import MAX_CLASSES, TRAINING, Manifest, load_manifest, read_record
from fractalshards.png import decode_image
from fractalshards.reader import decode_sample, index_split, read_sample
from fractalshards.remote.cache import ShardCache
from fractalshards.sample import classes_of
from fractalshards.webdataset import TarIndex, WebDatasetInfo, index_digest, index_tars, is_webdataset, load_webdataset
from fractalshards.workers import no_progress
from fractaltrain.data.source import BadSampleError, Example, LabelledSource
from fractaltrain.distributed import World
from fractaltrain.stream.order import Indices

_OPEN_FILES = 64


class ShardSource:
    """One split of a dataset; memory grows by 8 bytes per sample."""

    def __init__(self, manifest: Manifest, split: str, cache: ShardCache | None = None, open_files: int = 0) -> None:
        """Index the split.

        Args:
            cache: where the shards come from; None: they are in the manifest's folder.
            open_files: keep so many shards open; a cache cannot give their room to others. 0: a usual number.

        Raises:
            FractalError: if the split, a shard or a sidecar is missing, or they contradict each other.
        """
        self._shards = index_split(manifest, split, whole=cache is None)
        self._starts = np.cumsum([0, *self.lengths])
        if cache is None:
            self._files = OpenFiles()
            self._advice = f"check the copy with 'fractalshards verify {manifest.folder}'"
        else:
            self._files = OpenFiles(partial(_open_cached, cache), open_files)
            self._advice = "it came so; build the shard and push it again"
        self._classes = manifest.classes
        self._manifest, self._split = manifest, split

    @property
    def lengths(self) -> tuple[int, ...]:
        """Samples per shard."""
        return tuple(len(shard.offsets) - 1 for shard in self._shards)

    @property
    def classes(self) -> int:
        """Number of classes of the dataset."""
        return self._classes

    @property
    def labels(self) -> Indices:
        """(n,) int64: of the headers and labels of the tars alone, which are listed once and kept in the user's cache.

        Raises:
            FractalError: if a tar is damaged, or holds other labels than its sidecar says.
        """
        shards = self._manifest.splits[self._split]
        listings = index_tars((self._manifest.folder / shard.name, shard.samples) for shard in shards)
        labels = np.concatenate([listing.labels for listing in listings])
        highest = int(labels.max(initial=0))
        if highest >= self._classes or np.any(np.bincount(labels, minlength=self._classes) != self.label_counts):
            raise FractalError(f"{self._manifest.folder}: labels are not those that its sidecars count; {self._advice}")
        return labels

    @property
    def label_counts(self) -> Indices:
        """(classes,) int64, from the sidecars."""
        manifest = self._manifest
        records = [read_record(manifest.folder, shard.name, "single") for shard in manifest.splits[self._split]]
        counts = np.zeros(self._classes, np.int64)
        for record in records:
            if len(record.label_counts) != self._classes:
                raise FractalError(f"{manifest.folder}: {record.name} counts other classes; {self._advice}")
            counts += record.label_counts
        return counts

    @property
    def class_names(self) -> tuple[str, ...]:
        """As the manifest has them."""
        return self._manifest.class_names

    def read(self, index: int) -> Example:
        """Read and decode a sample.

        Raises:
            FractalError: naming shard and key, if the sample is damaged; naming the shard, if it cannot be fetched.
        """
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard = self._shards[number]
        place = index - int(self._starts[number])
        start, end = map(int, shard.offsets[place : place + 2])
        key = f"sample {place}"
        descriptor = self._files.descriptor(shard.path)
        try:
            sample = read_sample(descriptor, start, end)
            key = sample.key
            image, label = decode_sample(sample, self._classes)
            if isinstance(label, int) != (self._manifest.label_type == "single"):
                raise FractalError(f"not a label of a {self._manifest.label_type}-label dataset")
            return Example(sample.key, image, label if isinstance(label, int) else classes_of(label))
        except FractalError as error:
            raise BadSampleError(f"{shard.path}: {key}: {error}; {self._advice}") from error
        except OSError as error:
            raise BadSampleError(f"{shard.path}: {key}: {describe_os_error(error)}") from error


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _open_cached(cache: ShardCache, path: Path) -> int:
    return cache.open(path.name)


class OpenFiles:
    """Descriptors of the files read last: opening one per sample would burden the server of a shared file system."""

    def __init__(self, open_file: Callable[[Path], int] = _open, most: int = 0) -> None:
        """Keep ``most`` files open; 0: a usual number."""
        self._open = open_file
        self._most = most or _OPEN_FILES
        self._descriptors: OrderedDict[Path, int] = OrderedDict()

    def descriptor(self, path: Path) -> int:
        """An open descriptor, valid until as many other files as are kept open were asked for.

        Raises:
            FractalError: if the file cannot be opened, or fetched.
        """
        if path not in self._descriptors:
            try:
                self._descriptors[path] = self._open(path)
            except OSError as error:
                raise BadSampleError(describe_os_error(error)) from error
            if len(self._descriptors) > self._most:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(path)
        return self._descriptors[path]

    def __getstate__(self) -> dict[str, Any]:
        """Of another process, which has no open files yet."""
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


class ForeignSource:
    """One split; memory grows by 32 bytes and a key per sample."""

    def __init__(self, paths: Sequence[Path], listings: Sequence[TarIndex], classes: int) -> None:
        self._paths = paths
        self._listings = listings
        self._classes = classes
        self._starts = np.cumsum([0, *self.lengths])
        self._files = OpenFiles()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Samples per shard."""
        return tuple(map(len, self._listings))

    @property
    def classes(self) -> int:
        """Number of classes of the dataset."""
        return self._classes

    @property
    def labels(self) -> Indices:
        """(n,) int64, as the tars were listed."""
        return np.concatenate([listing.labels for listing in self._listings])

    @property
    def label_counts(self) -> Indices:
        """(classes,) int64."""
        return np.bincount(self.labels, minlength=self._classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """None are known."""
        return ()

    def read(self, index: int) -> Example:
        """Read and decode a sample.

        Raises:
            FractalError: naming shard and key, if the image is damaged; naming the shard, if it cannot be opened.
        """
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        path, listing = self._paths[number], self._listings[number]
        place = index - int(self._starts[number])
        key, start, size = listing.key(place), int(listing.starts[place]), int(listing.sizes[place])
        descriptor = self._files.descriptor(path)
        try:
            data = os.pread(descriptor, size, start)
            if len(data) != size:
                raise FractalError(f"file ends at byte {start + len(data)}, image should reach {start + size}")
            return Example(key, decode_image(data), int(listing.labels[place]))
        except FractalError as error:
            raise BadSampleError(f"{path}: {key}: {error}; fetch the file again") from error
        except OSError as error:
            raise BadSampleError(f"{path}: {key}: {describe_os_error(error)}") from error


HELD_OUT = ("val", "validation")  # what splits of held-out images are called


@dataclass(frozen=True)
class Dataset:
    """What is trained on.

    Attributes:
        held_out: None if there is no such split.
        image_size: side of its images in pixels, None if they differ or nobody knows.
        digest: tells datasets apart.
        kind: what its images are, as recipes distinguish them; empty for a foreign one.
        multi_label: its images show several classes each.
    """

    training: LabelledSource
    held_out: LabelledSource | None
    classes: int
    image_size: int | None
    digest: str
    kind: str = ""
    multi_label: bool = False


def open_dataset(folder: Path, world: World) -> Dataset:
    """Open a folder on every rank. Foreign tars are scanned by rank 0 while the others wait, once and for all.

    Raises:
        FractalError: if the dataset is missing, damaged or of another kind than can be trained on.
    """
    if is_webdataset(folder):
        info = load_webdataset(folder)
        with world.main_first():
            return _open_foreign(info, world)
    manifest = load_manifest(folder)
    return _ours(manifest, lambda split: ShardSource(manifest, split))


def open_cached(cache: ShardCache, window: int) -> Dataset:
    """A dataset of ours that lies elsewhere, behind the cache of its shards.

    Args:
        window: shards that training shuffles together; so many stay open, and of the held-out ones a single one.

    Raises:
        FractalError: as ``open_dataset`` does.
    """
    manifest = cache.manifest
    return _ours(manifest, lambda split: ShardSource(manifest, split, cache, window if split == TRAINING else 1))


def _ours(manifest: Manifest, open_split: Callable[[str], LabelledSource]) -> Dataset:
    training = open_split(TRAINING)
    return Dataset(
        training=training,
        held_out=next((open_split(name) for name in HELD_OUT if name in manifest.splits), None),
        classes=manifest.classes,
        image_size=manifest.image_size,
        digest=manifest.content_digest(),
        kind=str(manifest.recipe.get("kind", "")),
        multi_label=manifest.label_type == "multi",
    )


def _open_foreign(info: WebDatasetInfo, world: World) -> Dataset:
    names = [name for name in (TRAINING, *HELD_OUT) if name in info.splits][:2]
    if TRAINING not in names:
        found = ", ".join(info.splits) or "none"
        raise FractalError(f"{info.folder}: no split {TRAINING!r} to train on; it has {found}")
    shards = [shard for name in names for shard in info.splits[name]]
    with progress("finding samples, once", "tars") if world.main else nullcontext(no_progress) as on_progress:
        listings = index_tars(shards, on_progress)
    classes = _count_classes(info, listings)
    sources, first = [], 0
    for name in names:
        paths = [path for path, _ in info.splits[name]]
        sources.append(ForeignSource(paths, listings[first : first + len(paths)], classes))
        first += len(paths)
    held_out = sources[1] if len(sources) > 1 else None
    return Dataset(sources[0], held_out, classes, None, index_digest(listings))


def _count_classes(info: WebDatasetInfo, listings: tuple[TarIndex, ...]) -> int:
    """As ``_info.json`` says, else one more than the highest label."""
    highest = max((int(listing.labels.max()) for listing in listings if len(listing)), default=-1)
    classes = highest + 1 if info.classes is None else info.classes
    if not highest < classes <= MAX_CLASSES or not classes:
        raise FractalError(f"{info.folder}: labels reach {highest}, which does not fit {classes} classes")
    return classes
