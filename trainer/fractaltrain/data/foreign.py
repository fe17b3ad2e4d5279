"""Samples of a WebDataset folder that this project did not write, read in place: one pread per image."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fractalshards.console import describe_os_error
from fractalshards.errors import FractalError
from fractalshards.foreign import Listing
from fractalshards.png import decode_image
from fractaltrain.data.shards import OpenFiles
from fractaltrain.data.source import BadSampleError, Example, Indices


class ForeignSource:
    """One split; memory grows by 32 bytes and a key per sample."""

    def __init__(self, paths: Sequence[Path], listings: Sequence[Listing], classes: int) -> None:
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
