"""Random access to the stored samples of a dataset: sidecars give the offsets, and a sample is read with one pread.

from fractalshards import open_dataset
data = open_dataset("shards/single")
image, label = data[7]
"""

import operator
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fractalshards.errors import BadSampleError, FractalError, describe_os_error
from fractalshards.manifest import TRAINING, Manifest, load_manifest, read_record, split_shards
from fractalshards.png import Pixels, decode_image
from fractalshards.sample import Label, Sample, classes_of, decode_label, image_extension, parse_sample
from fractalshards.storage import regular_size
from fractalshards.tars import Tar, index_tars

MAX_OPEN_FILES = 64

FileStamp = tuple[int, int]  # size in bytes and time of the last change in ns
Fetch = Callable[[str], int]  # opens a file for reading, given its name, and returns its descriptor
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of a shard are: sample i is the bytes ``offsets[i]:offsets[i + 1]``."""

    path: Path
    offsets: Integers  # (samples + 1,)
    stamp: FileStamp | None = None  # of the file when it was indexed; None if it is still to be fetched


def index_split(manifest: Manifest, split: str, whole: bool = True) -> tuple[ShardIndex, ...]:
    """Index the shards of a split from their sidecars, checked against the manifest and the files' sizes.

    If not ``whole``, tars may be missing, and their sizes are not checked. A FractalError names what is missing or
    wrong.
    """
    indices = []
    for shard in split_shards(manifest, split):
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
        indices.append(ShardIndex(path, np.asarray(record.offsets, np.int64), stamp))
    return tuple(indices)


def count_labels(manifest: Manifest, split: str) -> Iterator[Integers]:
    """Yield for each shard of a split how many samples show each class, (classes,) int64, from its sidecar."""
    for shard in split_shards(manifest, split):
        counts = read_record(manifest.folder, shard.name, manifest.label_type).label_counts
        if len(counts) != manifest.classes:
            path = manifest.folder / shard.name
            raise FractalError(f"{path}: its sidecar counts {len(counts)} classes; fetch or build it again")
        yield np.array(counts, np.int64)


def iterate_shard(index: ShardIndex, positions: Iterable[int] | None = None) -> Iterator[Sample]:
    """Yield the samples at ``positions`` of a shard, by default all in order.

    A FractalError names the shard and the damaged sample.
    """
    with index.path.open("rb") as file:
        for position in range(len(index.offsets) - 1) if positions is None else positions:
            try:
                sample = parse_sample(read_blocks(file.fileno(), *index.offsets[position : position + 2].tolist()))
            except FractalError as error:
                raise FractalError(f"{index.path}: sample {position}: {error}; fetch or build it again") from error
            yield sample


def decode_shard(
    index: ShardIndex, classes: int, positions: Iterable[int] | None = None
) -> Iterator[tuple[Sample, Pixels, Label]]:
    """Yield samples as ``iterate_shard`` does, each with its image, (H, W, 3) uint8, and label."""
    for sample in iterate_shard(index, positions):
        try:
            image, label = decode_sample(sample, classes)
        except FractalError as error:
            raise FractalError(f"{index.path}: {sample.key}: {error}; fetch or build it again") from error
        yield sample, image, label


def read_blocks(descriptor: int, start: int, end: int) -> bytes:
    """Read the bytes ``[start, end)`` of an open file; raise FractalError if it ends early. Safe in many threads."""
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


class OpenFile(FileIO):
    """A file that is open for reading, and closed when nothing refers to it any more."""

    def __del__(self) -> None:
        self.close()


class OpenFiles:
    """Keeps recently read files open: opening one for every sample would overload a shared file system.

    Threads may share it: a file that one of them reads stays open while others open more than ``limit``.
    """

    def __init__(self, limit: int = MAX_OPEN_FILES, fetch: Fetch | None = None) -> None:
        """Keep at most ``limit`` files open; without ``fetch`` they are opened by their paths."""
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
                file = OpenFile(self._fetch(path.name) if self._fetch else path)
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


class Example(NamedTuple):
    """A decoded sample, and the name that it has in its dataset."""

    key: str
    image: Pixels  # (H, W, 3) uint8 RGB
    label: int | tuple[int, ...]  # class index, or the indices of all classes that a multi-label image shows


class StoredSplit:
    """One split of a dataset of shards: a sequence of (image, label). Takes 8 bytes of memory per sample.

    An image is (H, W, 3) uint8 RGB; a label is a class index, or the indices of all classes that a multi-label image
    shows. Works in threads, forked and spawned processes.

    Attributes:
        manifest: the whole dataset, as ``_info.json`` describes it.
        split: name of this split.
        classes: number of classes; labels are in [0, classes).
        class_names: by class index; empty if the classes have none.
        label_type: ``single`` or ``multi``: one class per image, or several.
        image_size: side of the square images in pixels; None if they differ.
        recipe: the recipe that the images were made by.
        digest: content digest of the dataset, all splits included: 32 hexadecimal digits.
        lengths: samples per shard, in order of index.
        files: the shards that are open.
    """

    def __init__(
        self, manifest: Manifest, split: str, fetch: Fetch | None = None, max_open_files: int = MAX_OPEN_FILES
    ) -> None:
        """Read the sidecars; raises FractalError if the split or a shard is missing, or they contradict each other.

        Args:
            fetch: opens a shard by its name, see ``ShardCache.open``; None: the shards are in the manifest's folder.
            max_open_files: shards that stay open; a cache cannot remove these to make room.
        """
        self.manifest, self.split = manifest, split
        self.classes, self.class_names = manifest.classes, manifest.class_names
        self.label_type, self.image_size = manifest.label_type, manifest.image_size
        self.recipe, self.digest = manifest.recipe, manifest.content_digest()
        self._shards = index_split(manifest, split, whole=fetch is None)
        self.lengths = tuple(len(shard.offsets) - 1 for shard in self._shards)
        self._starts = np.cumsum([0, *self.lengths])
        self.files = OpenFiles(max_open_files, fetch)
        verify = f"check the copy with 'fractalshards verify {manifest.folder}'"
        self._advice = verify if fetch is None else "the remote copy is damaged; build the shard and push it again"

    @property
    def label_counts(self) -> Integers:
        """Number of samples that show each class, (classes,) int64, from the sidecars."""
        return sum(count_labels(self.manifest, self.split), start=np.zeros(self.classes, np.int64))

    @property
    def labels(self) -> Integers:
        """Class index of every sample, (n,) int64, from the headers of all tars; must fit the sidecars' counts."""
        folder = self.manifest.folder
        if self.label_type != "single":
            raise FractalError(f"{folder}: images have several labels each; read them sample by sample")
        labels = np.concatenate([index.labels for index in index_tars([Tar(shard.path) for shard in self._shards])])
        highest = int(labels.max(initial=0))
        if highest >= self.classes or np.any(np.bincount(labels, minlength=self.classes) != self.label_counts):
            raise FractalError(f"{folder}: the labels do not match the counts in the sidecars; {self._advice}")
        return labels

    def __len__(self) -> int:
        """Return the number of samples."""
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[Pixels, int | tuple[int, ...]]:
        """Return image and label of a sample; see ``read``."""
        _, image, label = self.read(index)
        return image, label

    def __iter__(self) -> Iterator[tuple[Pixels, int | tuple[int, ...]]]:
        """Yield all samples, shard after shard."""
        return map(self.__getitem__, range(len(self)))

    def shard(self, number: int) -> Iterator[tuple[Pixels, int | tuple[int, ...]]]:
        """Yield the samples of shard ``number`` in order."""
        return map(self.__getitem__, range(*self._starts[number : number + 2].tolist()))

    def read(self, index: int) -> Example:
        """Read and decode sample ``index`` in [0, n).

        Raises IndexError if there is no such sample; BadSampleError, which names the shard, if it is damaged or cannot
        be read; FractalError if its shard cannot be fetched, or was changed after the dataset was opened.
        """
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"sample index is {index}: expected 0 to {len(self) - 1}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard, place = self._shards[number], index - int(self._starts[number])
        start, end = shard.offsets[place : place + 2].tolist()
        key = f"sample {place}"
        file = self.files.open(shard.path, shard.stamp)
        try:
            sample = parse_sample(read_blocks(file.fileno(), start, end))
            key = sample.key
            image, label = decode_sample(sample, self.classes)
            if isinstance(label, int) != (self.label_type == "single"):
                raise FractalError(f"not a label of a {self.label_type}-label dataset")
            return Example(key, image, label if isinstance(label, int) else classes_of(label))
        except FractalError as error:
            raise BadSampleError(f"{shard.path}: {key}: {error}; {self._advice}") from error
        except OSError as error:
            raise BadSampleError(f"{shard.path}: {key}: {describe_os_error(error)}") from error


def open_dataset(path: str | os.PathLike[str], split: str = TRAINING) -> StoredSplit:
    """Open a split of the dataset in a folder; raises FractalError if it is missing, or files contradict each other."""
    return StoredSplit(load_manifest(Path(path)), split)
