"""Samples of a dataset of shards: one pread per sample, wherever the sidecars say it lies."""

import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fractalshards.console import describe_os_error
from fractalshards.errors import FractalError
from fractalshards.foreign import list_shards
from fractalshards.labels import classes_of
from fractalshards.manifest import Manifest, read_record
from fractalshards.reader import decode_sample, index_split, read_sample
from fractalshards.sharing.cache import ShardCache
from fractaltrain.data.source import BadSampleError, Example, Indices

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
        listings = list_shards([(self._manifest.folder / shard.name, shard.samples) for shard in shards], _unseen)
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


def _unseen(tars: int) -> AbstractContextManager[Callable[[int], object]]:
    return nullcontext(lambda count: None)


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
