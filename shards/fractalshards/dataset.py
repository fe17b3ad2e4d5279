"""Random access to the stored samples of a dataset, each read with one pread; needs no PyTorch.

from fractalshards import open_dataset
data = open_dataset("shards/single")
image, label = data[7]
"""

import operator
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fractalshards.errors import BadSampleError, FractalError, describe_os_error
from fractalshards.manifest import TRAINING, Manifest, load_manifest
from fractalshards.png import Pixels
from fractalshards.reader import Example, OpenFiles, decode_sample, index_split, read_label_counts, read_sample
from fractalshards.sample import classes_of
from fractalshards.tars import Tar, index_tars

if TYPE_CHECKING:
    from fractalshards.remote.cache import ShardCache

MAX_OPEN_FILES = 64
_Indices = npt.NDArray[np.int64]


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
        self,
        manifest: Manifest,
        split: str,
        cache: "ShardCache | None" = None,
        max_open_files: int = MAX_OPEN_FILES,
    ) -> None:
        """Read the sidecars; raises FractalError if the split or a shard is missing, or they contradict each other.

        Args:
            cache: fetches the shards; None: they are in the manifest's folder.
            max_open_files: shards that stay open; the cache cannot remove these to make room.
        """
        self.manifest, self.split = manifest, split
        self.classes, self.class_names = manifest.classes, manifest.class_names
        self.label_type, self.image_size = manifest.label_type, manifest.image_size
        self.recipe, self.digest = manifest.recipe, manifest.content_digest()
        self._shards = index_split(manifest, split, whole=cache is None)
        self.lengths = tuple(len(shard.offsets) - 1 for shard in self._shards)
        self._starts = np.cumsum([0, *self.lengths])
        self.files = OpenFiles(max_open_files, cache.open if cache else None)
        self._advice = (
            f"check the copy with 'fractalshards verify {manifest.folder}'"
            if cache is None
            else "the remote copy is damaged; build the shard and push it again"
        )

    @property
    def label_counts(self) -> _Indices:
        """Number of samples that show each class, (classes,) int64, from the sidecars."""
        none = np.zeros(self.classes, np.int64)
        return sum((read_label_counts(self.manifest, one) for one in self.manifest.splits[self.split]), start=none)

    @property
    def labels(self) -> _Indices:
        """Class index of every sample, (n,) int64, from the headers of all tars; must fit the sidecars' counts."""
        manifest = self.manifest
        if self.label_type != "single":
            raise FractalError(f"{manifest.folder}: images show several classes each; read the labels of its samples")
        tars = [Tar(manifest.folder / shard.name) for shard in manifest.splits[self.split]]
        labels = np.concatenate([index.labels for index in index_tars(tars)])
        highest = int(labels.max(initial=0))
        if highest >= self.classes or np.any(np.bincount(labels, minlength=self.classes) != self.label_counts):
            raise FractalError(f"{manifest.folder}: labels are not those that its sidecars count; {self._advice}")
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
        for number in range(len(self.lengths)):
            yield from self.shard(number)

    def shard(self, number: int) -> Iterator[tuple[Pixels, int | tuple[int, ...]]]:
        """Yield the samples of shard ``number`` in order."""
        for index in range(*self._starts[number : number + 2].tolist()):
            yield self[index]

    def read(self, index: int) -> Example:
        """Read and decode sample ``index`` in [0, n).

        Raises:
            IndexError: if there is no such sample.
            BadSampleError: if it is damaged or its shard cannot be read, naming the shard.
            FractalError: if its shard cannot be fetched, or was changed after the dataset was opened.
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
            sample = read_sample(file.fileno(), start, end)
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
