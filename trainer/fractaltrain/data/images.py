"""Folders of images: ``PATH/train/CLASS/*`` for training and ``PATH/val/CLASS/*`` held out, as ImageNet is kept."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fractalshards.errors import FractalError, describe_os_error
from fractalshards.human import human_list
from fractalshards.manifest import find_manifest
from fractalshards.png import decode_image
from fractaltrain.data.source import BadSampleError, Example, LabelledSource, Source, split_per_class, split_share
from fractaltrain.stream.order import Indices

if TYPE_CHECKING:
    from fractaltrain.distributed import World


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


NAMES = ("digits", "cifar10", "cifar100")
FOLDER_PREFIX = "imagefolder:"
SHARDS_PREFIX = "shards:"
_DIGITS_TRAINING_SHARE = 0.8
_NAMED = 3  # of the classes that are missing


def is_data(name: str) -> bool:
    """Whether ``--data`` takes a name: one of ``NAMES``, ``imagefolder:PATH`` or ``shards:PATH``."""
    return name in NAMES or any(name.startswith(prefix) and name != prefix for prefix in (FOLDER_PREFIX, SHARDS_PREFIX))


def find_data(name: str) -> None:
    """Look whether shards or image folders are there, as far as takes no time; of other data it says nothing.

    Raises:
        FractalError: if they are not.
    """
    if name.startswith(SHARDS_PREFIX):
        find_manifest(Path(name.removeprefix(SHARDS_PREFIX)))
    elif name.startswith(FOLDER_PREFIX):
        find_folders(Path(name.removeprefix(FOLDER_PREFIX)))


@dataclass(frozen=True)
class DataChoice:
    """What ``--data`` and its companions say.

    ``name`` is as ``is_data`` takes it; with ``per_class`` only so many training
    images of every class are used, chosen by ``subset_seed``; ``folder`` is where CIFAR's archives are or go.
    """

    name: str
    per_class: int | None
    subset_seed: int
    folder: Path

    @property
    def path(self) -> Path | None:
        """Where the images are, unless the name says it all."""
        prefix, colon, path = self.name.partition(":")
        return Path(path) if prefix + colon in (FOLDER_PREFIX, SHARDS_PREFIX) else None

    @property
    def label(self) -> str:
        """A short name for folders and pictures: of a path, its last part."""
        return self.path.resolve().name if self.path else self.name

    @property
    def identity(self) -> str:
        """A name for files that other images do not have: ``cifar10``, or ``photos-3f2a91`` by a digest of the path."""
        if self.path is None:
            return self.name
        place = f"{self.name.partition(':')[0]}:{self.path.resolve()}"
        return f"{self.label}-{hashlib.sha256(place.encode()).hexdigest()[:6]}"


@dataclass(frozen=True)
class Data:
    """Images for training, and held-out ones.

    Attributes:
        class_names: by class index; empty where classes have none.
        digest: tells datasets of shards apart, and image folders on rank 0 for training; None for other images.
        multi_label: images show several classes each.
    """

    training: Source
    held_out: Source
    class_names: tuple[str, ...]
    digest: str | None = None
    multi_label: bool = False


class _Whole(NamedTuple):
    """All there is, with labels."""

    training: LabelledSource
    held_out: LabelledSource
    digest: str | None = None
    multi_label: bool = False


def open_data(choice: DataChoice, world: "World", for_training: bool = True) -> Data:
    """Open the images on every rank.

    CIFAR, image folders and shards come with their own held-out part, which is always whole. The digits have none: of
    them everything is held out that ``per_class`` does not choose, or a fifth of every class without it.

    Args:
        for_training: each class must be there in both parts, and images must show a single class each.

    Raises:
        FractalError: if the images are missing, damaged, without a held-out part, or too few for ``per_class``.
    """
    if choice.name == "digits":
        return _open_digits(choice)
    whole = _open_whole(choice, world, for_training)
    if for_training:
        _check_trainable(choice, whole)
    training: Source = whole.training
    if choice.per_class is not None:
        with world.main_first():  # labels of shards are listed once
            training, _ = split_per_class(whole.training, choice.per_class, choice.subset_seed)
    return Data(training, whole.held_out, whole.training.class_names, whole.digest, whole.multi_label)


def _open_digits(choice: DataChoice) -> Data:
    from fractaltrain.data.digits import load_digits

    digits = load_digits()
    if choice.per_class is None:
        train, held_out = split_share(digits, _DIGITS_TRAINING_SHARE, choice.subset_seed)
    else:
        train, held_out = split_per_class(digits, choice.per_class, choice.subset_seed)
    return Data(train, held_out, digits.class_names)


def _open_whole(choice: DataChoice, world: "World", for_training: bool) -> _Whole:
    if choice.name.startswith(SHARDS_PREFIX):
        return _open_shards(Path(choice.name.removeprefix(SHARDS_PREFIX)), world)
    with world.main_first():  # it may download
        if choice.name.startswith(FOLDER_PREFIX):
            train, held_out = load_folders(Path(choice.name.removeprefix(FOLDER_PREFIX)))
            digest = folders_digest(train, held_out) if for_training and world.main else None  # it looks at every file
            return _Whole(train, held_out, digest)
        from fractaltrain.data.cifar import load_cifar

        return _Whole(*load_cifar(choice.name, choice.folder))


def _open_shards(folder: Path, world: "World") -> _Whole:
    from fractaltrain.data.shards import HELD_OUT, open_dataset

    dataset = open_dataset(folder, world)
    if dataset.held_out is None:
        raise FractalError(
            f"{folder}: no split of held-out images ({' or '.join(HELD_OUT)}) to evaluate on; build or pack it with one"
        )
    return _Whole(dataset.training, dataset.held_out, dataset.digest, dataset.multi_label)


def _check_trainable(choice: DataChoice, whole: _Whole) -> None:
    if whole.multi_label:
        raise FractalError(
            f"{choice.path}: its images show several classes each; fine-tune on a dataset with one class per image"
        )
    for part, source in (("training", whole.training), ("held-out", whole.held_out)):
        missing = np.flatnonzero(source.label_counts == 0).tolist()
        if missing:
            names = [
                f"{label} ({source.class_names[label]})" if source.class_names else f"{label}" for label in missing
            ]
            raise FractalError(
                f"{choice.path or choice.name}: no {part} images of class {human_list(names, _NAMED)}; add some, or "
                "number the classes without gaps"
            )
