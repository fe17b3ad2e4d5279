"""Published datasets of real images, all read by torchvision, through one table.

Importing this module imports neither torch nor torchvision.
"""

import gzip
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import BadZipFile

import numpy as np

from fractalshards.errors import BadSampleError, FractalError
from fractalshards.human import one_line
from fractalshards.reader import Example
from fractaltrain.data.source import Indices, LabelledSource

_LABELS = ("targets", "labels", "_labels", "y")  # attributes of torchvision's datasets; the first that exists
_NAMES = ("classes", "categories")
_BROKEN = (
    *(OSError, HTTPException, EOFError, TarError, BadZipFile, zlib.error),
    *(RuntimeError, ValueError, LookupError, AssertionError),  # of torchvision's readers
)


@dataclass(frozen=True)
class Published:
    """A dataset of torchvision."""

    torchvision: str  # name of its class in ``torchvision.datasets``
    classes: int  # unless torchvision names them
    train: Mapping[str, Any]  # arguments that select the split to train on
    val: Mapping[str, Any] | None  # those of the split to evaluate on; None: it has none, so its images are divided
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


class PublishedSource:
    """A split of a dataset of torchvision; grey images become RGB."""

    def __init__(self, name: str, dataset: Any, classes: int) -> None:
        """Take over an opened dataset of torchvision; raises FractalError if it has labels outside of its classes."""
        self._name, self._dataset = name, dataset
        self.labels = _labels(dataset)
        self.lengths = (len(self.labels),)
        names = next((getattr(dataset, attribute) for attribute in _NAMES if hasattr(dataset, attribute)), ())
        self.class_names = tuple(map(str, names))
        self.classes = len(names) or classes
        if self.labels.min(initial=0) < 0 or self.labels.max(initial=0) >= self.classes:
            raise FractalError(f"{name}: has labels outside of its {self.classes} classes; fetch it again")

    @property
    def label_counts(self) -> Indices:
        """Number of samples per class, (classes,) int64."""
        return np.bincount(self.labels, minlength=self.classes)

    def read(self, index: int) -> Example:
        """Read and decode an image; raises BadSampleError if it cannot be read or decoded."""
        key = f"{self._name}/{index:06d}"
        try:
            image = self._dataset[index][0].convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # those that Pillow raises
            raise BadSampleError(f"{key}: {one_line(str(error))}; fetch the dataset again") from error
        return Example(key, np.asarray(image), int(self.labels[index]))


def load_published(name: str, folder: Path) -> tuple[LabelledSource, LabelledSource | None]:
    """Open a dataset of ``PUBLISHED``: the split to train on, and the one to evaluate on, if it has one.

    torchvision unpickles CIFAR's files only if their MD5 sums are the published ones. Raises FractalError if files are
    damaged, or are missing and cannot be downloaded.

    Args:
        folder: holds what torchvision downloads; what is missing is downloaded to it. For ``mnist``, ``fashion-mnist``
            and ``kmnist`` it may instead hold the four original files, ``train-images-idx3-ubyte.gz`` and so on.
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
        files = [file for file, _ in getattr(dataset_class, "resources", ())]  # of the datasets in MNIST's format
        if files and all((folder / file).is_file() for file in files):
            return PublishedSource(key, _open_flat(dataset_class, folder, split), entry.classes)
        return PublishedSource(key, dataset_class(folder, **arguments), entry.classes)
    except _BROKEN as error:
        file, url = (getattr(dataset_class, attribute, "") for attribute in ("filename", "url"))
        fetch = f"fetch it from {url}" if url else f"put there what torchvision.datasets.{entry.torchvision} downloads"
        raise FractalError(
            f"{folder / file}: {name} is missing or damaged, and cannot be downloaded ({one_line(str(error))}); "
            f"{fetch} (another folder: --data-dir)"
        ) from error


def _open_flat(dataset_class: Any, folder: Path, split: Mapping[str, Any]) -> Any:
    """Open a dataset of MNIST's format whose compressed files lie in one folder."""
    with TemporaryDirectory() as root:
        raw = Path(root, dataset_class.__name__, "raw")
        raw.mkdir(parents=True)
        for file, _ in dataset_class.resources:  # their MD5 sums are those of one compressor; gzip checks the bytes
            with gzip.open(folder / file) as packed, (raw / file.removesuffix(".gz")).open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        return dataset_class(root, **split)  # reads all of it into memory


def _labels(dataset: Any) -> Indices:
    for attribute in _LABELS:
        if hasattr(dataset, attribute):
            return np.asarray(getattr(dataset, attribute), np.int64)
    return np.asarray([label for _, label in dataset._samples], np.int64)
