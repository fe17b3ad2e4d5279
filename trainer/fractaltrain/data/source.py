"""What the stream reads from: numbered samples, of which any can be read at any time, and parts of such."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from fractalshards.errors import FractalError
from fractaltrain.stream.bits import Purpose, mix, permutation

Images = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]


class BadSampleError(FractalError):
    """One sample cannot be read; others may. What cannot be fetched at all is no such error."""


class Example(NamedTuple):
    """One sample: its key, its image (H, W, 3) uint8 RGB, its class index, or those of all classes that it shows."""

    key: str
    image: Images
    label: int | tuple[int, ...]


class Source(Protocol):
    """Samples 0..n-1 of known classes. Reading must be safe in forked loader workers."""

    @property
    def lengths(self) -> Sequence[int]:
        """Samples per shard, in order of index; a single entry where there are no shards."""

    @property
    def classes(self) -> int:
        """Number of classes; labels are in [0, classes)."""

    def read(self, index: int) -> Example:
        """Read a sample.

        Raises:
            BadSampleError: if it is damaged, naming file and key.
            FractalError: if its file cannot be had.
        """


class LabelledSource(Source, Protocol):
    """A source whose labels are known without reading it, so that it can be split by class."""

    @property
    def labels(self) -> Indices:
        """(n,) int64 class indices."""

    @property
    def label_counts(self) -> Indices:
        """(classes,) int64: how many samples each class has."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class index; empty where classes have none."""


@dataclass(frozen=True)
class ArraySource:
    """Images held in memory: ``images`` (n, H, W, 3) uint8, ``labels`` (n,) int64; keys are ``name/index``."""

    name: str
    images: Images
    labels: Indices
    classes: int
    class_names: tuple[str, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """All samples, as one shard."""
        return (len(self.images),)

    @property
    def label_counts(self) -> Indices:
        """(classes,) int64."""
        return np.bincount(self.labels, minlength=self.classes)

    def read(self, index: int) -> Example:
        """Read a sample."""
        return Example(f"{self.name}/{index:06d}", self.images[index], int(self.labels[index]))


@dataclass(frozen=True)
class Subset:
    """Some samples of a source, in the order of ``indices`` (m,) int64; keys stay those of the source."""

    source: Source
    indices: Indices

    @property
    def lengths(self) -> tuple[int, ...]:
        """All samples, as one shard."""
        return (len(self.indices),)

    @property
    def classes(self) -> int:
        """As the source."""
        return self.source.classes

    def read(self, index: int) -> Example:
        """Read a sample."""
        return self.source.read(int(self.indices[index]))


def split_per_class(source: LabelledSource, per_class: int, seed: int) -> tuple[Subset, Subset]:
    """``per_class`` samples of every class, and all the others.

    Raises:
        FractalError: if a class has fewer samples than that.
    """
    return _split(source, [per_class] * source.classes, seed)


def split_share(source: LabelledSource, share: float, seed: int) -> tuple[Subset, Subset]:
    """A share in (0, 1) of the samples of every class, rounded, and all the others."""
    counts = np.bincount(source.labels, minlength=source.classes)
    return _split(source, [round(share * int(count)) for count in counts], seed)


def _split(source: LabelledSource, wanted: Sequence[int], seed: int) -> tuple[Subset, Subset]:
    chosen = np.zeros(len(source.labels), np.bool_)
    for label, count in enumerate(wanted):
        members = np.flatnonzero(source.labels == label)
        if count > len(members):
            raise FractalError(f"class {label} has {len(members)} training samples, not {count}; lower --per-class")
        chosen[members[permutation(len(members), mix(seed, Purpose.SUBSET, label))[:count]]] = True
    return Subset(source, np.flatnonzero(chosen)), Subset(source, np.flatnonzero(~chosen))
