"""Real images to fine-tune and evaluate on: digits, published datasets, folders of image files, and shards.

Importing this module imports neither torch, torchvision nor scikit-learn.
"""

import hashlib
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fractalshards.errors import BadSampleError, FractalError, describe_os_error
from fractalshards.human import human_list
from fractalshards.imagefolder import ImageFiles, list_folder, parse_place
from fractalshards.png import decode_image
from fractalshards.reader import Example
from fractalshards.webdataset import WebDatasetOptions, find_dataset
from fractaltrain.config import DATA_KINDS, ImagesConfig
from fractaltrain.data.published import load_published
from fractaltrain.data.source import (
    Indices,
    InMemorySource,
    LabelledSource,
    Splits,
    divide,
)

if TYPE_CHECKING:
    from fractaltrain.distributed import World  # which imports torch

_log = logging.getLogger(__name__)

_FOLDERS = {"train": "train", "val": "val"}
_DIGITS_LEVELS = 16
_MAX_NAMED = 3  # classes without images that an error lists at most


def find_data(name: str, tars: WebDatasetOptions) -> None:
    """Check quickly that the folders of ``shards:PATH`` or ``imagefolder:PATH`` exist; other names always pass.

    Raises FractalError if one does not; UsageError if ``tars`` has options for tars of other programs, and there are
    none.
    """
    place = parse_place(name, DATA_KINDS)
    if place and place[0] == "shards":
        find_dataset(place[1], tars)
        return
    tars.check_unused(name)
    for folder in [place[1] / name for name in _FOLDERS] if place else []:
        if not folder.is_dir():
            raise FractalError(f"{folder}: no such folder; images belong in PATH/train/CLASS/ and PATH/val/CLASS/")


def open_data(choice: ImagesConfig, world: "World", for_training: bool = True) -> Splits[LabelledSource]:
    """Open images to train on and to evaluate on, on every rank. Collective.

    The split to evaluate on is used whole. Datasets without one are divided: ``per_class`` images, or four fifths of
    every class, are for training, all others for evaluation. Raises FractalError if the images are missing, damaged,
    without a split to evaluate on, or too few for ``per_class``.

    Args:
        for_training: check that both splits have images of every class and that images have a single label; compute
            the digest of image folders (rank 0), which stats every file.
    """
    if choice.name == "digits":
        return Splits(*divide(load_digits(), choice.per_class, choice.subset_seed))
    if choice.path and choice.name.startswith("shards:"):
        from fractaltrain.data.shards import VAL_SPLITS, open_shards

        splits = open_shards(choice.path, world, choice.tars, for_training)
        if splits.val is None:
            raise FractalError(
                f"{choice.path}: no split to evaluate on ({' or '.join(VAL_SPLITS)}); build or pack it with one, or "
                "say with --split which tars of another program belong to it"
            )
    elif choice.path:
        with world.main_first():
            splits = _open_folders(choice.path, world, for_training)
    else:
        with world.main_first():  # rank 0 may download
            train, val = load_published(choice.name, choice.folder)
        if val is None:
            return Splits(*divide(train, choice.per_class, choice.subset_seed))
        splits = Splits(train, val)
    if for_training:
        _check_trainable(choice, splits)
    if choice.per_class is None or not for_training:
        return splits
    labels = world.from_main(lambda: splits.train.labels)  # of shards, from the headers of all tars
    return replace(splits, train=divide(splits.train, choice.per_class, choice.subset_seed, labels)[0])


def _open_folders(path: Path, world: "World", for_training: bool) -> Splits[LabelledSource]:
    listing = list_folder(path, _FOLDERS)
    for text in listing.notes if world.main else ():
        _log.info("%s", text)
    train, val = (FolderSource(listing.splits[split], listing.class_names or listing.class_ids) for split in _FOLDERS)
    if not (for_training and world.main):
        return Splits(train, val)
    # a digest of file names and sizes: reading all files would take too long
    return Splits(train, val, hashlib.sha256(train.describe() + b"\n" + val.describe()).hexdigest()[:32])


def _check_trainable(choice: ImagesConfig, splits: Splits[LabelledSource]) -> None:
    if splits.multi_label:
        raise FractalError(
            f"{choice.path}: its images show several classes each; fine-tune on a dataset with one class per image"
        )
    for split, source in (("train", splits.train), ("val", splits.val)):
        missing = np.flatnonzero(source.label_counts == 0).tolist() if source else []
        if source and missing:
            names = source.class_names
            shown = [f"{label} ({names[label]})" if names else f"{label}" for label in missing]
            raise FractalError(
                f"{choice.path or choice.name}: no images of class {human_list(shown, _MAX_NAMED)} in {split}; add "
                "some, or number the classes without gaps"
            )


def load_digits() -> InMemorySource:
    """Load scikit-learn's 1,797 handwritten digits (UCI optdigits), 8 x 8, with grey levels 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits as load_sklearn_digits

    digits = load_sklearn_digits()
    grey = np.rint(digits.images * (255 / _DIGITS_LEVELS)).astype(np.uint8)
    images, labels = np.repeat(grey[..., None], 3, axis=3), digits.target.astype(np.int64)
    return InMemorySource("digits", images, labels, classes=10, class_names=tuple("0123456789"))


class FolderSource:
    """Image files in one folder per class, which are read when needed."""

    def __init__(self, images: ImageFiles, class_names: tuple[str, ...]) -> None:
        self._images = images
        self.labels: Indices = images.labels
        self.lengths = (len(images.names),)
        self.classes = len(class_names)
        self.class_names = class_names

    @property
    def label_counts(self) -> Indices:
        return np.bincount(self.labels, minlength=self.classes)

    def describe(self) -> bytes:
        """Return a line per image: its path below the folder, which names its class, and its size in bytes."""
        files = ((os.fsencode(name), os.stat(self._images.root / name).st_size) for name in self._images.names)
        return b"".join(b"%s %d\n" % file for file in files)

    def read(self, index: int) -> Example:
        """Read and decode an image; its key is its path below the folder.

        Raises BadSampleError if it cannot be read or decoded, naming the file.
        """
        try:
            image = decode_image(self._images.read(index))
        except FractalError as error:
            raise BadSampleError(f"{self._images.location(index)}: {error}; replace or remove it") from error
        except OSError as error:
            raise BadSampleError(describe_os_error(error)) from error
        return Example(self._images.names[index], image, int(self.labels[index]))
