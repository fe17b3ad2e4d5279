"""Folders of images: ``PATH/train/CLASS/*`` for training and ``PATH/val/CLASS/*`` held out, as ImageNet is kept."""

import hashlib
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from fractalshards.console import describe_os_error
from fractalshards.errors import FractalError
from fractalshards.png import decode_image
from fractaltrain.data.source import BadSampleError, Example
from fractaltrain.stream.order import Indices

_LAYOUT = "images belong into PATH/train/CLASS/ and PATH/val/CLASS/"


class FolderSource:
    """The images of one folder per class, listed once and read when asked for."""

    def __init__(self, folder: Path) -> None:
        """List the images.

        Raises:
            FractalError: if its class folders or the images in one of them are missing.
        """
        from torchvision.datasets import ImageFolder  # seconds, for which ``find_folders`` does not wait

        try:
            listing = ImageFolder(folder)
        except FileNotFoundError as error:
            raise FractalError(f"{folder}: {str(error).split('. Supported')[0]}; {_LAYOUT}") from error
        self._folder = folder
        self._paths = [path for path, _ in listing.samples]
        self._labels = np.asarray(listing.targets, np.int64)
        self.class_names = tuple(listing.classes)

    @property
    def lengths(self) -> tuple[int, ...]:
        """All samples, as one shard."""
        return (len(self._paths),)

    @property
    def classes(self) -> int:
        """One per class folder."""
        return len(self.class_names)

    @property
    def labels(self) -> Indices:
        """(n,) int64: class folders are numbered in alphabetical order."""
        return self._labels

    @property
    def label_counts(self) -> Indices:
        """(classes,) int64."""
        return np.bincount(self._labels, minlength=self.classes)

    def describe(self) -> Iterator[bytes]:
        """A line of each image: its path below the folder, which has its class, and its size in bytes.

        Raises:
            OSError: if one is no longer there.
        """
        for path in self._paths:
            yield b"%s %d\n" % (os.fsencode(os.path.relpath(path, self._folder)), os.stat(path).st_size)

    def read(self, index: int) -> Example:
        """Read and decode an image; its key is its path below the folder.

        Raises:
            FractalError: naming the file, if it cannot be read or decoded.
        """
        path = Path(self._paths[index])
        try:
            image = decode_image(path.read_bytes())
        except FractalError as error:
            raise BadSampleError(f"{path}: {error}; replace or remove it") from error
        except OSError as error:
            raise BadSampleError(describe_os_error(error)) from error
        return Example(str(path.relative_to(self._folder)), image, int(self._labels[index]))


def find_folders(path: Path) -> tuple[Path, Path]:
    """``path/train`` and ``path/val``.

    Raises:
        FractalError: if one is missing.
    """
    parts = (path / "train", path / "val")
    for folder in parts:
        if not folder.is_dir():
            raise FractalError(f"{folder}: no such folder; {_LAYOUT}")
    return parts


def load_folders(path: Path) -> tuple[FolderSource, FolderSource]:
    """The images for training and the held-out ones.

    Raises:
        FractalError: if either part is missing or empty, or they have other classes.
    """
    train, held_out = map(FolderSource, find_folders(path))
    if train.class_names != held_out.class_names:
        odd = sorted(set(train.class_names) ^ set(held_out.class_names))
        raise FractalError(
            f"{path}: train and val differ in their class folders ({', '.join(odd[:5])}); make them equal"
        )
    return train, held_out


def folders_digest(train: FolderSource, held_out: FolderSource) -> str:
    """Tells image folders apart by the names and sizes of their files, for reading all of them would take long."""
    digest = hashlib.sha256()
    for line in chain(train.describe(), [b"\n"], held_out.describe()):
        digest.update(line)
    return digest.hexdigest()[:32]
