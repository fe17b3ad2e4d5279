"""Random access to the samples of a dataset: sidecars give the offsets, and reading a sample is one pread."""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fractalshards.errors import BadSampleError, FractalError, describe_os_error
from fractalshards.manifest import Manifest, Shard, read_record, split_shards
from fractalshards.png import Pixels, decode_image
from fractalshards.sample import Label, Sample, classes_of, decode_label, image_extension, parse_sample
from fractalshards.storage import regular_size

FileStamp = tuple[int, int]  # size in bytes and time of the last change in ns


class Example(NamedTuple):
    """A decoded sample.

    Attributes:
        key: name of the sample in its dataset.
        image: (H, W, 3) uint8 RGB.
        label: class index, or the indices of all classes that a multi-label image shows.
    """

    key: str
    image: Pixels
    label: int | tuple[int, ...]


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of a shard are.

    Attributes:
        offsets: (samples + 1,) int64: sample i is the bytes ``offsets[i]:offsets[i + 1]``.
        stamp: that of the file when it was indexed; None if it is still to be fetched.
    """

    path: Path
    offsets: npt.NDArray[np.int64]
    stamp: FileStamp | None = None


def index_split(manifest: Manifest, split: str, whole: bool = True) -> tuple[ShardIndex, ...]:
    """Index all shards of a split from their sidecars, checked against the manifest and the files' sizes.

    If not ``whole``, tars may be missing, and their sizes are not checked. A FractalError names what is
    missing or wrong.
    """
    return tuple(_index_shard(manifest, shard, whole) for shard in split_shards(manifest, split))


def decode_shard(
    index: ShardIndex, classes: int, positions: Iterable[int] | None = None
) -> Iterator[tuple[Sample, Pixels, Label]]:
    """Yield samples of a shard with image, (H, W, 3) uint8, and label: those at ``positions``, by default all.

    A FractalError names the shard and the damaged sample.
    """
    with index.path.open("rb") as file:
        for position in range(len(index.offsets) - 1) if positions is None else positions:
            key = f"sample {position}"
            try:
                sample = read_sample(file.fileno(), *index.offsets[position : position + 2].tolist())
                key = sample.key
                image, label = decode_sample(sample, classes)
            except FractalError as error:
                raise FractalError(f"{index.path}: {key}: {error}; fetch or build it again") from error
            yield sample, image, label


def read_label_counts(manifest: Manifest, shard: Shard) -> npt.NDArray[np.int64]:
    """Return how many samples of a shard show each class, (classes,) int64, from its sidecar."""
    counts = read_record(manifest.folder, shard.name, manifest.label_type).label_counts
    if len(counts) != manifest.classes:
        raise FractalError(f"{manifest.folder / shard.name}: its sidecar counts other classes; fetch or build it again")
    return np.array(counts, np.int64)


def read_sample(descriptor: int, start: int, end: int) -> Sample:
    """Read one sample from an open shard; safe from many processes and threads at once."""
    return parse_sample(read_blocks(descriptor, start, end))


def read_blocks(descriptor: int, start: int, end: int) -> bytes:
    """Read the bytes ``[start, end)`` of an open file; raise FractalError if it ends early."""
    data = os.pread(descriptor, end - start, start)
    if len(data) != end - start:
        raise FractalError(f"file ends at byte {start + len(data)}, but the sample ends at {end}")
    return data


def decode_sample(sample: Sample, classes: int) -> tuple[Pixels, Label]:
    """Decode a sample to its image, (H, W, 3) uint8, and label, which must be in [0, classes)."""
    label = decode_label(sample.files)
    if (largest := max(classes_of(label), default=0)) >= classes:
        raise FractalError(f"label {largest}, but there are {classes} classes")
    return decode_image(sample.files[image_extension(sample.files)]), label


def iterate_shard(index: ShardIndex) -> Iterator[Sample]:
    """Yield all samples of a shard in order; a FractalError names the shard and the first damaged one."""
    with index.path.open("rb") as file:
        for start, end in zip(index.offsets[:-1].tolist(), index.offsets[1:].tolist(), strict=True):
            try:
                yield read_sample(file.fileno(), start, end)
            except FractalError as error:
                raise FractalError(f"{index.path}: {error}; fetch or build it again") from error


def _index_shard(manifest: Manifest, shard: Shard, whole: bool) -> ShardIndex:
    path = manifest.folder / shard.name
    try:
        record = read_record(manifest.folder, shard.name, manifest.label_type)
        stamp = (regular_size(path), path.stat().st_mtime_ns) if whole else None
    except FileNotFoundError as error:
        raise FractalError(f"{error.filename}: missing; fetch or build it again") from error
    if record.sha256 != shard.sha256:
        raise FractalError(f"{path}: its sidecar and the manifest disagree; fetch or build it again")
    if stamp and stamp[0] != record.bytes:
        raise FractalError(f"{path}: {stamp[0]} bytes instead of {record.bytes}; fetch or build it again")
    return ShardIndex(path, np.asarray(record.offsets, np.int64), stamp)


class OpenFile:
    """A file that is open for reading, and closed when nothing refers to it any more."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        """Return the file descriptor."""
        return self._descriptor

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: os is gone when Python ends
        close(self._descriptor)


class OpenFiles:
    """Keeps recently read files open: opening one for every sample would overload a shared file system.

    Threads may share it: a file that one of them reads stays open while others open more than ``limit``.
    """

    def __init__(self, limit: int, fetch: Callable[[str], int] | None = None) -> None:
        """Keep at most ``limit`` files open.

        Args:
            fetch: returns the descriptor of a file that is opened for reading, given its name; None: open it locally.
        """
        self.limit = limit
        self._fetch = fetch
        self._files: OrderedDict[Path, OpenFile] = OrderedDict()

    def open(self, path: Path, stamp: FileStamp | None = None) -> OpenFile:
        """Open a file, or return it if it is open.

        Raises BadSampleError if it cannot be opened; FractalError, if it cannot be fetched or has another ``stamp``.
        """
        file = self._files.pop(path, None)
        if file is None:
            try:
                file = OpenFile(self._fetch(path.name) if self._fetch else os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            except OSError as error:
                raise BadSampleError(describe_os_error(error)) from error
            status = os.fstat(file.fileno())
            if stamp and stamp != (status.st_size, status.st_mtime_ns):
                raise FractalError(f"{path}: was changed after the dataset was opened; open it again")
        self._files[path] = file
        while len(self._files) > self.limit:
            with suppress(KeyError):  # another thread was faster
                self._files.popitem(last=False)
        return file

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open files: a process that unpickles this opens them again."""
        return {**self.__dict__, "_files": OrderedDict()}
