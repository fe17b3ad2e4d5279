"""What is to be packed: image files that are known but not yet read, with their classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


class Images(Protocol):
    """Image files in some order. Light and picklable, for parts of it travel to worker processes."""

    def __len__(self) -> int: ...

    def take(self, chosen: Indices) -> "Images":
        """Those at the given positions, in that order."""
        ...

    def name(self, index: int) -> str:
        """Where a file is, for people."""
        ...

    def read(self, index: int) -> bytes:
        """The bytes of a file.

        Raises:
            FractalError: if it is cut off, or larger than a sample may be.
            OSError: if it cannot be read.
        """
        ...


@dataclass(frozen=True)
class Part:
    """The images of a split; ``labels`` is (n,) int64, their class indices."""

    images: Images
    labels: Indices

    def take(self, chosen: Indices) -> "Part":
        """Those at the given positions, in that order."""
        return Part(self.images.take(chosen), self.labels[chosen])


@dataclass(frozen=True)
class ImageListing:
    """All there is to pack.

    ``parts`` has ``train`` and perhaps ``val``; names and ids are by class index, or empty. ``digest`` identifies the
    list: 32 hexadecimal digits over splits, classes and names of files, wherever they lie. ``notes`` tell what was
    left out.
    """

    classes: int
    class_names: tuple[str, ...]
    class_ids: tuple[str, ...]
    parts: Mapping[str, Part]
    digest: str
    notes: Sequence[str] = ()
