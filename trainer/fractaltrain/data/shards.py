"""Samples of sharded datasets, each read with one pread: our own shards, a cache of remote ones, WebDataset folders."""

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fractalshards.errors import FractalError, describe_os_error
from fractalshards.manifest import MAX_CLASSES, TRAINING, Manifest, load_manifest, read_record
from fractalshards.png import decode_image
from fractalshards.reader import decode_sample, index_split, read_blocks, read_sample
from fractalshards.remote.cache import ShardCache
from fractalshards.sample import classes_of
from fractalshards.tars import Tar, TarIndex, index_digest, index_tars
from fractalshards.webdataset import DEFAULT_OPTIONS, WebDatasetOptions, is_webdataset, load_webdataset
from fractaltrain.data.source import BadSampleError, Example, Indices, LabelledSource, Splits

if TYPE_CHECKING:
    from fractaltrain.distributed import World  # which imports torch

VAL_SPLITS = ("val", "validation")  # names of the split to evaluate on; the first that exists is used
_MAX_OPEN_FILES = 64


def open_dataset(folder: Path, world: "World", tars: WebDatasetOptions = DEFAULT_OPTIONS) -> Splits:
    """Open a folder of shards, ours or anyone's in WebDataset format, on every rank. Collective.

    Args:
        tars: how to read a folder of another program. Rank 0 reads the headers of its tars for all ranks.

    Raises:
        FractalError: if the dataset is missing or damaged, or has no split ``train``.
    """
    if is_webdataset(folder):
        return world.from_main(lambda: _open_webdataset(folder, tars))
    manifest = load_manifest(folder)
    return _open_splits(manifest, lambda split: ShardSource(manifest, split))


def open_cached(cache: ShardCache, window: int) -> Splits:
    """Open a remote dataset behind a prepared cache.

    Args:
        window: shards that are shuffled together; training keeps this many open, evaluation one.

    Raises:
        FractalError: as ``open_dataset`` does.
    """
    manifest = cache.manifest
    return _open_splits(manifest, lambda split: ShardSource(manifest, split, cache, window if split == TRAINING else 1))


def _open_splits(manifest: Manifest, open_split: Callable[[str], LabelledSource]) -> Splits:
    val = next((name for name in VAL_SPLITS if name in manifest.splits), None)
    return Splits(
        train=open_split(TRAINING),
        val=open_split(val) if val else None,
        digest=manifest.content_digest(),
        image_size=manifest.image_size,
        multi_label=manifest.label_type == "multi",
    )


class ShardSource:
    """One split of a dataset; takes 8 bytes of memory per sample."""

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        cache: ShardCache | None = None,
        max_open_files: int = _MAX_OPEN_FILES,
    ) -> None:
        """Read the sidecars.

        Args:
            cache: fetches the shards; None: they are in the manifest's folder.
            max_open_files: shards that stay open; the cache cannot remove these to make room.

        Raises:
            FractalError: if the split, a shard or a sidecar is missing, or they contradict each other.
        """
        self.classes, self.class_names = manifest.classes, manifest.class_names
        self._manifest, self._split = manifest, split
        self._shards = index_split(manifest, split, whole=cache is None)
        self.lengths = tuple(len(shard.offsets) - 1 for shard in self._shards)
        self._starts = np.cumsum([0, *self.lengths])
        self._files = _OpenFiles(max_open_files, cache)
        self._advice = (
            f"check the copy with 'fractalshards verify {manifest.folder}'"
            if cache is None
            else "the remote copy is damaged; build the shard and push it again"
        )

    @property
    def label_counts(self) -> Indices:
        """Number of samples per class, (classes,) int64, from the sidecars."""
        manifest = self._manifest
        counts = np.zeros(self.classes, np.int64)
        for shard in manifest.splits[self._split]:
            record = read_record(manifest.folder, shard.name, "single")
            if len(record.label_counts) != self.classes:
                raise FractalError(f"{manifest.folder}: {record.name} counts other classes; {self._advice}")
            counts += record.label_counts
        return counts

    @property
    def labels(self) -> Indices:
        """Class index of every sample, (n,) int64, from the headers of all tars.

        Raises:
            FractalError: if a tar is damaged, or its labels are not those that its sidecar counts.
        """
        manifest = self._manifest
        tars = [Tar(manifest.folder / shard.name, shard.samples) for shard in manifest.splits[self._split]]
        labels = np.concatenate([index.labels for index in index_tars(tars)])
        highest = int(labels.max(initial=0))
        if highest >= self.classes or np.any(np.bincount(labels, minlength=self.classes) != self.label_counts):
            raise FractalError(f"{manifest.folder}: labels are not those that its sidecars count; {self._advice}")
        return labels

    def read(self, index: int) -> Example:
        """Read and decode a sample.

        Raises:
            BadSampleError: if it is damaged or its shard cannot be read, naming the shard.
            FractalError: if its shard cannot be fetched.
        """
        number, place = _find(self._starts, index)
        shard = self._shards[number]
        start, end = shard.offsets[place : place + 2].tolist()
        key = f"sample {place}"
        descriptor = self._files.descriptor(shard.path)
        try:
            sample = read_sample(descriptor, start, end)
            key = sample.key
            image, label = decode_sample(sample, self.classes)
            if isinstance(label, int) != (self._manifest.label_type == "single"):
                raise FractalError(f"not a label of a {self._manifest.label_type}-label dataset")
            return Example(key, image, label if isinstance(label, int) else classes_of(label))
        except FractalError as error:
            raise BadSampleError(f"{shard.path}: {key}: {error}; {self._advice}") from error
        except OSError as error:
            raise BadSampleError(f"{shard.path}: {key}: {describe_os_error(error)}") from error


class WebDatasetSource:
    """One split of a WebDataset folder; takes 32 bytes of memory per sample, and its key."""

    class_names: tuple[str, ...] = ()  # WebDataset folders have none

    def __init__(self, paths: Sequence[Path], indices: Sequence[TarIndex], classes: int) -> None:
        self.lengths = tuple(map(len, indices))
        self.classes = classes
        self._paths = paths
        self._indices = indices
        self._starts = np.cumsum([0, *self.lengths])
        self._files = _OpenFiles(_MAX_OPEN_FILES)

    @property
    def labels(self) -> Indices:
        return np.concatenate([tar.labels for tar in self._indices])

    @property
    def label_counts(self) -> Indices:
        return np.bincount(self.labels, minlength=self.classes)

    def read(self, index: int) -> Example:
        """Read and decode a sample.

        Raises:
            BadSampleError: if it is damaged or its tar cannot be read, naming the tar.
        """
        number, place = _find(self._starts, index)
        path, tar = self._paths[number], self._indices[number]
        key, start, size = tar.key(place), int(tar.starts[place]), int(tar.sizes[place])
        descriptor = self._files.descriptor(path)
        try:
            image = decode_image(read_blocks(descriptor, start, start + size))
            return Example(key, image, int(tar.labels[place]))
        except FractalError as error:
            raise BadSampleError(f"{path}: {key}: {error}; fetch the file again") from error
        except OSError as error:
            raise BadSampleError(f"{path}: {key}: {describe_os_error(error)}") from error


def _open_webdataset(folder: Path, options: WebDatasetOptions) -> Splits:
    info = load_webdataset(folder, options)
    names = [name for name in (TRAINING, *VAL_SPLITS) if name in info.splits][:2]
    if TRAINING not in names:
        found = ", ".join(info.splits) or "none"
        raise FractalError(
            f"{folder}: no split {TRAINING!r} to train on, only {found}; say which tars belong to it with --split"
        )
    indices = {name: index_tars(info.splits[name], options.skip_bad) for name in names}
    for name in names:
        if not sum(map(len, indices[name])):
            raise FractalError(f"{folder}: no samples in {name}; check the path, and that images have labels")
    together = list(chain.from_iterable(indices.values()))
    classes = _count_classes(folder, info.classes, together)
    sources = [WebDatasetSource([tar.path for tar in info.splits[name]], indices[name], classes) for name in names]
    return Splits(sources[0], sources[1] if len(sources) > 1 else None, index_digest(together))


def _count_classes(folder: Path, listed: int | None, indices: Sequence[TarIndex]) -> int:
    """Return the number of classes that the info file lists, else the highest label plus one."""
    highest = max(int(tar.labels.max(initial=-1)) for tar in indices)
    classes = highest + 1 if listed is None else listed
    if not highest < classes <= MAX_CLASSES:
        raise FractalError(
            f"{folder}: labels reach {highest}, which does not fit {classes} classes; labels count from 0, to at most "
            f"{MAX_CLASSES - 1}; correct them, or num_classes in the info file"
        )
    return classes


def _find(starts: Indices, index: int) -> tuple[int, int]:
    """Return the shard that holds a sample and its place there; ``starts`` are the first samples of all shards."""
    shard = int(np.searchsorted(starts, index, side="right")) - 1
    return shard, index - int(starts[shard])


class _OpenFiles:
    """Keeps recently read files open: opening one for every sample would overload a shared file system."""

    def __init__(self, limit: int, cache: ShardCache | None = None) -> None:
        self._limit = limit
        self._cache = cache
        self._descriptors: OrderedDict[Path, int] = OrderedDict()

    def descriptor(self, path: Path) -> int:
        """Open a file; the descriptor is valid until ``limit`` other files are asked for.

        Raises:
            BadSampleError: if the file cannot be opened.
            FractalError: if it cannot be fetched.
        """
        if path not in self._descriptors:
            try:
                self._descriptors[path] = (
                    self._cache.open(path.name) if self._cache else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                )
            except OSError as error:
                raise BadSampleError(describe_os_error(error)) from error
            if len(self._descriptors) > self._limit:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(path)
        return self._descriptors[path]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open files: a process that unpickles this opens them again."""
        return {**self.__dict__, "_descriptors": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
