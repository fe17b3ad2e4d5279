"""List the images to pack, with their class labels, from a folder ``CLASS/*`` or ``SPLIT/CLASS/*``."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from fractalshards.errors import FractalError
from fractalshards.human import human_count
from fractalshards.manifest import MAX_CLASSES, MAX_SAMPLE_BYTES

Indices = npt.NDArray[np.int64]

SPLITS = ("train", "val")
TOO_LARGE = f"larger than {MAX_SAMPLE_BYTES >> 20} MiB, too large for a sample"
_SYNSET = re.compile(r"n\d{8}", re.ASCII)
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision's
_LAYOUT = "images belong in PATH/CLASS/, or in PATH/train/CLASS/ and PATH/val/CLASS/"


class Images(Protocol):
    """Image files in some order and their class indices; small enough to pickle, because workers get a part each."""

    @property
    def labels(self) -> Indices:
        """Class index of each image, (n,) int64."""
        ...

    def take(self, positions: Indices) -> "Images":
        """Select images by position, in the order given."""
        ...

    def name(self, position: int) -> str:
        """Path of an image, for messages."""
        ...

    def read(self, position: int) -> bytes:
        """Read an image file.

        Raises:
            FractalError: if it is truncated or larger than a sample may be.
            OSError: if it cannot be read.
        """
        ...


@dataclass(frozen=True)
class ImageListing:
    """The images of a source by split, before shares are held out.

    Attributes:
        class_names, class_ids: by class index, or empty.
        splits: images of ``train`` and perhaps ``val``.
        digest: 32 hexadecimal digits that identify splits, classes and file names, but not where the files are.
        notes: what was left out, for the user.
    """

    classes: int
    class_names: tuple[str, ...]
    class_ids: tuple[str, ...]
    splits: Mapping[str, Images]
    digest: str
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class FolderImages:
    """Image files by their paths below ``folder``; see ``Images``."""

    folder: Path
    paths: tuple[str, ...]
    labels: Indices

    def take(self, positions: Indices) -> "FolderImages":
        paths = tuple(self.paths[position] for position in positions.tolist())
        return FolderImages(self.folder, paths, self.labels[positions])

    def name(self, position: int) -> str:
        return str(self.folder / self.paths[position])

    def read(self, position: int) -> bytes:
        with (self.folder / self.paths[position]).open("rb") as file:
            data = file.read(MAX_SAMPLE_BYTES + 1)
        if len(data) > MAX_SAMPLE_BYTES:
            raise FractalError(TOO_LARGE)
        return data


@dataclass(frozen=True)
class _SplitFolder:
    classes: tuple[str, ...]
    images: FolderImages
    skipped: int


def are_synsets(names: Iterable[str]) -> bool:
    """Return whether all names are WordNet synset ids such as ``n01440764``."""
    return all(_SYNSET.fullmatch(name) for name in names)


def has_splits(path: Path) -> bool:
    """Return whether an image folder is ``train/CLASS/*``; a folder ``train`` without subfolders is a class."""
    return (path / "train").is_dir() and bool(_class_folders(path / "train"))


def list_folder(path: Path, folders: Mapping[str, str] | None = None) -> ImageListing:
    """List the images of each split of an image folder.

    Symbolic links are followed. Hidden files and folders and files without an image extension are left out.

    Args:
        folders: the folder below ``path`` for each split; by default ``train`` and ``val`` if they exist, else all
            images are in split ``train``.

    Raises:
        FractalError: if a folder, its classes or the images of a class are missing, or the splits differ in classes.
        OSError: if a folder cannot be read.
    """
    if folders is None:
        folders = {name: name for name in SPLITS if (path / name).is_dir()} if has_splits(path) else {"train": ""}
    found = {split: _list_split(path / name, split) for split, name in folders.items()}
    classes = found["train"].classes
    for split, other in found.items():
        if other.classes != classes:
            different = ", ".join(sorted(set(classes) ^ set(other.classes))[:5])
            raise FractalError(f"{path}: train and {split} have different class folders ({different}); make them equal")
    digest = xxhash.xxh3_128()
    for split, one in found.items():
        for name in one.images.paths:
            digest.update(os.fsencode(f"{split}/{name}") + b"\0")
    return ImageListing(
        classes=len(classes),
        class_names=() if are_synsets(classes) else classes,
        class_ids=classes if are_synsets(classes) else (),
        splits={split: one.images for split, one in found.items()},
        digest=digest.hexdigest(),
        notes=tuple(_notes(path, folders, found)),
    )


def _notes(path: Path, folders: Mapping[str, str], found: Mapping[str, _SplitFolder]) -> Iterator[str]:
    if folders == {"train": "train"} and not (path / "val").is_dir():
        yield f"no folder val in {path}, so no split val; name the folders with --split train=DIR,val=DIR"
    if all(name.count("/") > 1 for one in found.values() for name in one.images.paths):
        yield (
            f"all images are in subfolders of {found['train'].classes[0]}, ...; if those folders are splits rather "
            "than classes, name them with --split train=DIR,val=DIR"
        )
    if skipped := sum(one.skipped for one in found.values()):
        yield f"skipped {human_count(skipped, 'file')}: hidden, outside of class folders, or without image extension"


def _list_split(folder: Path, split: str) -> _SplitFolder:
    if not folder.is_dir():
        raise FractalError(f"{folder}: no such folder, so no images for {split}; {_LAYOUT}")
    classes = _class_folders(folder)
    if not 0 < len(classes) <= MAX_CLASSES:
        raise FractalError(f"{folder}: contains {human_count(len(classes), 'class folder')}; {_LAYOUT}")
    paths: list[str] = []
    labels: list[int] = []
    skipped = sum(not entry.is_dir() for entry in os.scandir(folder))
    for label, name in enumerate(classes):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise FractalError(f"{folder}: class folder {name!r} is not UTF-8; rename it") from error
        files = list(_walk(folder, name, (folder.resolve(),)))
        images = sorted(file for file in files if _is_image(file))
        if not images:
            raise FractalError(f"{folder / name}: contains no image; add some or remove the folder")
        paths += images
        labels += [label] * len(images)
        skipped += len(files) - len(images)
    return _SplitFolder(classes, FolderImages(folder, tuple(paths), np.array(labels, np.int64)), skipped)


def _class_folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _is_hidden(entry.name)))


def _walk(top: Path, below: str, parents: tuple[Path, ...]) -> Iterator[str]:
    """Yield all files under ``top/below`` as paths relative to ``top``, following links but not in circles."""
    folder = (top / below).resolve()
    if folder in parents:
        raise FractalError(f"{top / below}: a link to a folder that contains it; remove it")
    with os.scandir(folder) as entries:
        for entry in entries:
            path = f"{below}/{entry.name}"
            if entry.is_dir():
                if not _is_hidden(entry.name):
                    yield from _walk(top, path, (*parents, folder))
            elif _is_image(path) and not entry.is_file():
                raise FractalError(f"{top / path}: neither a regular file nor a link to one; remove it")
            else:
                yield path


def _is_image(path: str) -> bool:
    return path.lower().endswith(_EXTENSIONS) and not _is_hidden(path.rpartition("/")[2])


def _is_hidden(name: str) -> bool:
    return name.startswith(".")
