"""Samples of a dataset of shards, read in place: one pread per sample, wherever the sidecars say it lies."""

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np

from fractalshards.console import describe_os_error
from fractalshards.errors import FractalError
from fractalshards.manifest import Manifest
from fractalshards.reader import decode_sample, index_split, read_sample
from fractaltrain.data.source import Example

_OPEN_FILES = 64


class ShardSource:
    """One split of a dataset; memory grows by 8 bytes per sample."""

    def __init__(self, manifest: Manifest, split: str) -> None:
        """Index the split.

        Raises:
            FractalError: if the split, a shard or a sidecar is missing, they contradict each other, or images have
                labels of several classes.
        """
        if manifest.label_type != "single":
            raise FractalError(
                f"{manifest.folder}: its images show several classes each, which cannot be trained on yet; "
                "choose a dataset of kind fractaldb or single"
            )
        self._shards = index_split(manifest, split)
        self._starts = np.cumsum([0, *self.lengths])
        self._files = OpenFiles()
        self._classes = manifest.classes

    @property
    def lengths(self) -> tuple[int, ...]:
        """Samples per shard."""
        return tuple(len(shard.offsets) - 1 for shard in self._shards)

    @property
    def classes(self) -> int:
        """Number of classes of the dataset."""
        return self._classes

    def read(self, index: int) -> Example:
        """Read and decode a sample.

        Raises:
            FractalError: naming shard and key, if the sample is damaged.
        """
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard = self._shards[number]
        place = index - int(self._starts[number])
        start, end = map(int, shard.offsets[place : place + 2])
        key = f"sample {place}"
        try:
            sample = read_sample(self._files.descriptor(shard.path), start, end)
            key = sample.key
            image, label = decode_sample(sample, self._classes)
            if not isinstance(label, int):
                raise FractalError("not a label of one class")
            return Example(sample.key, image, label)
        except FractalError as error:
            advice = f"check the copy with 'fractalshards verify {shard.path.parent}'"
            raise FractalError(f"{shard.path}: {key}: {error}; {advice}") from error
        except OSError as error:
            raise FractalError(f"{shard.path}: {key}: {describe_os_error(error)}") from error


class OpenFiles:
    """Descriptors of the files read last: opening one per sample would burden the server of a shared file system."""

    def __init__(self) -> None:
        self._descriptors: OrderedDict[Path, int] = OrderedDict()

    def descriptor(self, path: Path) -> int:
        """An open descriptor, valid until ``_OPEN_FILES`` other files were asked for."""
        if path not in self._descriptors:
            self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._descriptors) > _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors.move_to_end(path)
        return self._descriptors[path]

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
