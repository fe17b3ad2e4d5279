"""Sources of samples: any sample can be read at any time by its index."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fractalshards.errors import FractalError
from fractalshards.random import permutation
from fractalshards.reader import Example
from fractaltrain.seeding import Purpose, mix

Images = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

_TRAIN_SHARE = 0.8  # share of a dataset without splits that is for training


class SampleSource(Protocol):
    """Samples 0 to n - 1 of a dataset. Must work in forked and in spawned (pickled) loader workers."""

    @property
    def lengths(self) -> Sequence[int]:
        """Number of samples per shard, in order of index; one entry for a source without shards."""

    @property
    def classes(self) -> int:
        """Number of classes; labels are in [0, classes)."""

    def read(self, index: int) -> Example:
        """Read and decode a sample.

        Raises BadSampleError if it is damaged or its file cannot be read, naming the file; FractalError if its file
        cannot be fetched.
        """


class LabelledSource(SampleSource, Protocol):
    """A source that knows its labels without decoding images, so that it can be split by class."""

    @property
    def labels(self) -> Indices:
        """Class index of every sample, (n,) int64."""

    @property
    def label_counts(self) -> Indices:
        """Number of samples per class, (classes,) int64."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names by index; empty if the classes have none."""


_Source = TypeVar("_Source", bound=SampleSource, covariant=True)


@dataclass(frozen=True)
class Splits(Generic[_Source]):
    """Samples to train on and to evaluate on."""

    train: _Source
    val: _Source | None
    digest: str | None = None  # identifies the dataset; None if its name does
    image_size: int | None = None  # side of all images in pixels; None if they differ or it is unknown
    multi_label: bool = False  # whether an image shows several classes
    recipe: Mapping[str, Any] = field(default_factory=dict)  # how it was rendered or packed; empty if unknown


class WithLabels:
    """Base class of sources that keep their labels, see ``LabelledSource``; without ``lengths`` they have no shards."""

    def __init__(
        self, labels: Indices, classes: int, class_names: tuple[str, ...] = (), lengths: Sequence[int] = ()
    ) -> None:
        self.labels, self.classes, self.class_names = labels, classes, class_names
        self.lengths = lengths or (len(labels),)

    @property
    def label_counts(self) -> Indices:
        return np.bincount(self.labels, minlength=self.classes)


class InMemorySource(WithLabels):
    """Images in memory, (n, H, W, 3), with keys ``name/index``."""

    def __init__(
        self, name: str, images: Images, labels: Indices, classes: int, class_names: tuple[str, ...] = ()
    ) -> None:
        super().__init__(labels, classes, class_names)
        self.name, self.images = name, images

    def read(self, index: int) -> Example:
        return Example(f"{self.name}/{index:06d}", self.images[index], int(self.labels[index]))


class Subset(WithLabels):
    """The samples ``indices`` (m,) of a source, with their keys and ``labels`` (m,)."""

    def __init__(self, source: LabelledSource, indices: Indices, labels: Indices) -> None:
        super().__init__(labels, source.classes, source.class_names)
        self._source, self._indices = source, indices

    def read(self, index: int) -> Example:
        return self._source.read(int(self._indices[index]))


def divide(source: LabelledSource, labels: Indices, per_class: int | None, seed: int) -> tuple[Subset, Subset]:
    """Divide into random samples of every class, ``per_class`` or four fifths (None), and all others.

    ``labels`` are those of the source. Raises FractalError if a class has fewer samples than ``per_class``.
    """
    chosen = np.zeros(len(labels), np.bool_)
    for label in range(source.classes):
        members = np.flatnonzero(labels == label)
        count = round(_TRAIN_SHARE * len(members)) if per_class is None else per_class
        if count > len(members):
            raise FractalError(f"class {label} has {len(members)} training samples; lower --per-class")
        chosen[members[permutation(len(members), mix(seed, Purpose.SUBSET, label))[:count]]] = True
    first, others = (Subset(source, np.flatnonzero(mask), labels[mask]) for mask in (chosen, ~chosen))
    return first, others
