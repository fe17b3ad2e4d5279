"""Real images to fine-tune and evaluate on: digits, published datasets, folders of image files, and shards.

torchvision reads the published datasets, through one table. Importing this module imports neither torch, torchvision
nor scikit-learn.
"""

import gzip
import hashlib
import logging
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from fractalshards.errors import BadSampleError, FractalError, describe_os_error
from fractalshards.human import human_list, one_line
from fractalshards.image_files import ImageFiles, list_folder, parse_place
from fractalshards.png import decode_image
from fractalshards.reader import Example
from fractalshards.webdataset import WebDatasetOptions, find_dataset
from fractaltrain.config import DATA_KINDS, ImagesConfig
from fractaltrain.data.source import Indices, InMemorySource, LabelledSource, Splits, WithLabels, divide

if TYPE_CHECKING:
    from fractaltrain.distributed import World  # imports torch

_log = logging.getLogger(__name__)

_FOLDERS = {"train": "train", "val": "val"}
_DIGITS_LEVELS = 16
_MAX_NAMED = 3  # most classes without images in an error


def is_data(name: str) -> bool:
    """Return whether ``--data`` accepts a name: one of ``DATA_NAMES``."""
    return name == "digits" or name in PUBLISHED or parse_place(name, DATA_KINDS) is not None


def find_data(name: str, tars: WebDatasetOptions) -> None:
    """Check quickly that the folders of ``shards:PATH`` or ``imagefolder:PATH`` exist.

    Raises FractalError if one does not; UsageError if ``tars`` has options, and there are no tars of other programs.
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
    """Open images to train and evaluate on, on every rank. Collective.

    The split to evaluate on is used whole. A dataset without one is divided: ``per_class`` images, or four fifths of
    every class, are for training, all others for evaluation. Raises FractalError if the images are missing, damaged,
    without a split to evaluate on, or too few for ``per_class``.

    Args:
        for_training: check that both splits have images of every class and that each image has one label; compute the
            digest of image folders (on rank 0), which looks at every file.
    """
    splits: Splits[LabelledSource]
    if choice.name == "digits":
        splits = Splits(load_digits(), None)
    elif choice.path and choice.name.startswith("shards:"):
        from fractaltrain.data.shards import VAL_SPLITS, open_shards

        splits = open_shards(choice.path, world, choice.tars, for_training)
        if splits.val is None:
            advice = "build or pack the dataset with one, or name its tars with --split"
            raise FractalError(f"{choice.path}: no split {VAL_SPLITS[0]!r} to evaluate on; {advice}")
    elif choice.path:
        with world.main_first():
            splits = _open_folders(choice.path, world, for_training)
    else:
        with world.main_first():  # rank 0 may download
            splits = Splits(*open_published(choice.name, choice.folder))
    if for_training:
        _check_trainable(choice, splits)
    if splits.val is not None and (choice.per_class is None or not for_training):
        return splits
    labels = world.from_main(lambda: splits.train.labels)  # of shards, from the headers of all tars
    train, others = divide(splits.train, labels, choice.per_class, choice.subset_seed)
    return replace(splits, train=train, val=others if splits.val is None else splits.val)


def _open_folders(path: Path, world: "World", for_training: bool) -> Splits[LabelledSource]:
    listing = list_folder(path, _FOLDERS)
    for text in listing.notes if world.main else ():
        _log.info("%s", text)
    train, val = (FolderSource(listing.splits[split], listing.class_names or listing.class_ids) for split in _FOLDERS)
    digest = None
    if for_training and world.main:  # by names and sizes: reading all files would take too long
        digest = hashlib.sha256(train.describe() + b"\n" + val.describe()).hexdigest()[:32]
    return Splits(train, val, digest)


def _check_trainable(choice: ImagesConfig, splits: Splits[LabelledSource]) -> None:
    if splits.multi_label:
        raise FractalError(f"{choice.path}: images show several classes each; fine-tune on images of one class each")
    for split, source in (("train", splits.train), ("val", splits.val)):
        if source and (missing := np.flatnonzero(source.label_counts == 0).tolist()):
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


class FolderSource(WithLabels):
    """Image files in one folder per class, which are read when needed."""

    def __init__(self, images: ImageFiles, class_names: tuple[str, ...]) -> None:
        super().__init__(images.labels, len(class_names), class_names)
        self._images = images

    def describe(self) -> bytes:
        """Return a line per image: its path below the folder, which names its class, and its size in bytes."""
        files = ((os.fsencode(name), os.stat(self._images.root / name).st_size) for name in self._images.names)
        return b"".join(b"%s %d\n" % file for file in files)

    def read(self, index: int) -> Example:
        """Read and decode an image; raises BadSampleError if it cannot be read or decoded, naming the file."""
        try:
            image = decode_image(self._images.read(index))
        except FractalError as error:
            raise BadSampleError(f"{self._images.location(index)}: {error}; replace or remove it") from error
        except OSError as error:
            raise BadSampleError(describe_os_error(error)) from error
        return Example(self._images.names[index], image, int(self.labels[index]))


@dataclass(frozen=True)
class Published:
    """A dataset of torchvision."""

    torchvision: str  # name of its class in ``torchvision.datasets``
    classes: int  # number of classes, unless torchvision names them
    train: Mapping[str, Any]  # arguments that select the split to train on
    val: Mapping[str, Any] | None  # the same for evaluation; None: there is no such split, so the images are divided
    downloads: bool = True  # whether torchvision can download it


_TRAIN, _TEST = {"train": True}, {"train": False}
_TRAIN_SPLIT, _TEST_SPLIT = {"split": "train"}, {"split": "test"}
_ALL_SPLIT = {"split": "trainval"}

PUBLISHED: Mapping[str, Published] = {
    "cifar10": Published("CIFAR10", 10, _TRAIN, _TEST),
    "cifar100": Published("CIFAR100", 100, _TRAIN, _TEST),
    "mnist": Published("MNIST", 10, _TRAIN, _TEST),
    "fashion-mnist": Published("FashionMNIST", 10, _TRAIN, _TEST),
    "kmnist": Published("KMNIST", 10, _TRAIN, _TEST),
    "svhn": Published("SVHN", 10, _TRAIN_SPLIT, _TEST_SPLIT),
    "stl10": Published("STL10", 10, _TRAIN_SPLIT, _TEST_SPLIT),
    "flowers102": Published("Flowers102", 102, _TRAIN_SPLIT, _TEST_SPLIT),
    "food101": Published("Food101", 101, _TRAIN_SPLIT, _TEST_SPLIT),
    "oxford-pets": Published("OxfordIIITPet", 37, _ALL_SPLIT, _TEST_SPLIT),
    "dtd": Published("DTD", 47, _TRAIN_SPLIT, _TEST_SPLIT),
    "eurosat": Published("EuroSAT", 10, {}, None),
    "gtsrb": Published("GTSRB", 43, _TRAIN_SPLIT, _TEST_SPLIT),
    "caltech101": Published("Caltech101", 101, {}, None),
    "country211": Published("Country211", 211, _TRAIN_SPLIT, _TEST_SPLIT),
    "fgvc-aircraft": Published("FGVCAircraft", 100, _ALL_SPLIT, _TEST_SPLIT),
    "stanford-cars": Published("StanfordCars", 196, _TRAIN_SPLIT, _TEST_SPLIT, downloads=False),
}

DATA_NAMES = ("digits", *PUBLISHED, *(f"{kind}:PATH" for kind in DATA_KINDS))

_LABELS = ("targets", "labels", "_labels", "y")  # attributes of torchvision's datasets; the first that exists
_NAMES = ("classes", "categories")
_BROKEN = (
    *(OSError, HTTPException, EOFError, TarError, BadZipFile, zlib.error),
    *(RuntimeError, ValueError, LookupError, AssertionError),  # raised by torchvision's readers
)


class PublishedSource(WithLabels):
    """A split of a dataset of torchvision; grey images become RGB."""

    def __init__(self, name: str, dataset: Any, classes: int) -> None:
        """Wrap an opened dataset of torchvision; raises FractalError if a label is not one of its classes."""
        names = next((getattr(dataset, attribute) for attribute in _NAMES if hasattr(dataset, attribute)), ())
        super().__init__(_labels(dataset), len(names) or classes, tuple(map(str, names)))
        self._name, self._dataset = name, dataset
        if self.labels.min(initial=0) < 0 or self.labels.max(initial=0) >= self.classes:
            raise FractalError(f"{name}: has labels outside of its {self.classes} classes; fetch it again")

    def read(self, index: int) -> Example:
        """Read and decode an image; raises BadSampleError if it cannot be read or decoded."""
        key = f"{self._name}/{index:06d}"
        try:
            image = self._dataset[index][0].convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # raised by Pillow
            raise BadSampleError(f"{key}: {one_line(str(error))}; fetch the dataset again") from error
        return Example(key, np.asarray(image), int(self.labels[index]))


def open_published(name: str, folder: Path) -> tuple[LabelledSource, LabelledSource | None]:
    """Open a dataset of ``PUBLISHED``: the split to train on, and the one to evaluate on, if it has one.

    torchvision unpickles CIFAR's files only if their MD5 sums are the published ones. Raises FractalError if files are
    damaged, or missing and cannot be downloaded.

    Args:
        folder: contains what torchvision downloads; missing files are downloaded. For ``mnist``, ``fashion-mnist`` and
            ``kmnist`` it may instead contain the four original files, ``train-images-idx3-ubyte.gz`` and so on.
    """
    entry = PUBLISHED[name]
    train = _open(name, entry, entry.train, folder)
    return train, None if entry.val is None else _open(name, entry, entry.val, folder)


def _open(name: str, entry: Published, split: Mapping[str, Any], folder: Path) -> PublishedSource:
    import torchvision.datasets

    dataset_class = getattr(torchvision.datasets, entry.torchvision)
    key = f"{name}/{split.get('split') or ('train' if split.get('train', True) else 'test')}"
    arguments = {**split, **({"download": True} if entry.downloads else {})}
    try:
        files = [file for file, _ in getattr(dataset_class, "resources", ())]  # datasets in MNIST's format have them
        if files and all((folder / file).is_file() for file in files):
            return PublishedSource(key, _open_flat(dataset_class, folder, split), entry.classes)
        return PublishedSource(key, dataset_class(folder, **arguments), entry.classes)
    except _BROKEN as error:
        file, url = (getattr(dataset_class, attribute, "") for attribute in ("filename", "url"))
        fetch = f"fetch it from {url}" if url else f"put the files of torchvision.datasets.{entry.torchvision} there"
        raise FractalError(
            f"{folder / file}: {name} is missing or damaged, and cannot be downloaded ({one_line(str(error))}); "
            f"{fetch} (another folder: --data-dir)"
        ) from error


def _open_flat(dataset_class: Any, folder: Path, split: Mapping[str, Any]) -> Any:
    """Open a dataset in MNIST's format from the compressed files in one folder."""
    with TemporaryDirectory() as root:
        raw = Path(root, dataset_class.__name__, "raw")
        raw.mkdir(parents=True)
        for file, _ in dataset_class.resources:  # their MD5 sums depend on the compressor; gzip checks the bytes
            with gzip.open(folder / file) as packed, (raw / file.removesuffix(".gz")).open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        return dataset_class(root, **split)  # reads all of it into memory


def _labels(dataset: Any) -> Indices:
    for attribute in _LABELS:
        if hasattr(dataset, attribute):
            return np.asarray(getattr(dataset, attribute), np.int64)
    return np.asarray([label for _, label in dataset._samples], np.int64)
