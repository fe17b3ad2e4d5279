"""Lists an image folder, ``CLASS/*`` or ``SPLIT/CLASS/*``, with classes numbered as torchvision's ImageFolder does."""

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from fractalshards.errors import FractalError
from fractalshards.human import human_count
from fractalshards.manifest import MAX_CLASSES, MAX_SAMPLE_BYTES
from fractalshards.packing.listing import ImageListing, Indices, Part
from fractalshards.packing.wordnet import are_synsets

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # of torchvision
_LAYOUT = "images belong into PATH/CLASS/, or into PATH/train/CLASS/ and PATH/val/CLASS/"


@dataclass(frozen=True)
class FileImages:
    """Image files by their paths below a folder."""

    folder: Path
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, chosen: Indices) -> "FileImages":
        """Those at the given positions, in that order."""
        return FileImages(self.folder, tuple(self.paths[index] for index in chosen.tolist()))

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self.folder / self.paths[index])

    def read(self, index: int) -> bytes:
        """The bytes of a file; see ``Images``."""
        with (self.folder / self.paths[index]).open("rb") as file:
            data = file.read(MAX_SAMPLE_BYTES + 1)
        if len(data) > MAX_SAMPLE_BYTES:
            raise FractalError(f"larger than {MAX_SAMPLE_BYTES >> 20} MiB, too large for a sample")
        return data


def holds_splits(path: Path) -> bool:
    """Whether an image folder is ``train/CLASS/*``; a folder ``train`` without folders in it is a class."""
    return (path / "train").is_dir() and bool(_folders(path / "train"))


def list_folder(path: Path, folders: Mapping[str, str] | None = None) -> ImageListing:
    """List the images of each split.

    Links are followed. Hidden files and folders, and files without the name of an image, are left out.

    Args:
        folders: for each split its folder below ``path``; by default those named ``train`` and ``val``, or, if there
            are none, all is ``train``.

    Raises:
        FractalError: if a folder, its classes or the images of one are missing, or splits differ in their classes.
        OSError: if a folder cannot be read.
    """
    folders = folders or _default_folders(path)
    found = {split: _list_split(path / name, split) for split, name in folders.items()}
    classes = found["train"].classes
    for split, other in found.items():
        if other.classes != classes:
            odd = ", ".join(sorted(set(classes) ^ set(other.classes))[:5])
            raise FractalError(f"{path}: train and {split} differ in their class folders ({odd}); make them equal")
    digest = xxhash.xxh3_128()
    for split, one in found.items():
        for name in one.images.paths:
            digest.update(os.fsencode(f"{split}/{name}") + b"\0")
    return ImageListing(
        classes=len(classes),
        class_names=() if are_synsets(classes) else classes,
        class_ids=classes if are_synsets(classes) else (),
        parts={split: Part(one.images, one.labels) for split, one in found.items()},
        digest=digest.hexdigest(),
        notes=tuple(_notes(path, folders, found)),
    )


@dataclass(frozen=True)
class _Found:
    classes: tuple[str, ...]
    images: FileImages
    labels: Indices
    skipped: int


def _default_folders(path: Path) -> dict[str, str]:
    if not holds_splits(path):
        return {"train": ""}
    return {split: split for split in ("train", "val") if (path / split).is_dir()}


def _notes(path: Path, folders: Mapping[str, str], found: Mapping[str, _Found]) -> Iterator[str]:
    """What was left out, and what looks as if it was not meant so."""
    if folders == {"train": "train"} and not (path / "val").is_dir():
        yield f"no folder val in {path}, so no split val; name folders with --split train=DIR,val=DIR"
    if all(name.count("/") > 1 for one in found.values() for name in one.images.paths):
        yield (
            f"all images lie in folders below {found['train'].classes[0]}, ...; if those are splits and not classes, "
            "name them with --split train=DIR,val=DIR"
        )
    if skipped := sum(one.skipped for one in found.values()):
        yield f"skipped {human_count(skipped, 'file')}: hidden, in no class, or not named as images"


def _list_split(folder: Path, split: str) -> _Found:
    if not folder.is_dir():
        raise FractalError(f"{folder}: no such folder, so nothing for {split}; {_LAYOUT}")
    classes = _folders(folder)
    if not 0 < len(classes) <= MAX_CLASSES:
        raise FractalError(f"{folder}: {human_count(len(classes), 'class folder')} in it; {_LAYOUT}")
    paths: list[str] = []
    counts = []
    skipped = sum(not entry.is_dir() for entry in os.scandir(folder))
    for name in classes:
        _check_text(folder, name)
        files = list(_walk(folder, name, (_identity(folder),)))
        images = sorted(file for file in files if _is_image(file))
        if not images:
            raise FractalError(f"{folder / name}: no image in this class; add some or remove the folder")
        paths += images
        counts.append(len(images))
        skipped += len(files) - len(images)
    labels = np.repeat(np.arange(len(classes)), counts)
    return _Found(classes, FileImages(folder, tuple(paths)), labels, skipped)


def _folders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not _hidden(entry.name)))


def _walk(top: Path, below: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    """All files in ``top/below`` and its folders, by their paths below ``top``.

    Args:
        above: device and inode of the folders that lead there, for a link may lead back to one of them.
    """
    folder = top / below
    if (here := _identity(folder)) in above:
        raise FractalError(f"{folder}: a link to a folder that it lies in; remove it")
    with os.scandir(folder) as entries:
        for entry in entries:
            path = f"{below}/{entry.name}"
            if entry.is_dir():
                if not _hidden(entry.name):
                    yield from _walk(top, path, (*above, here))
            elif _is_image(path) and not entry.is_file():
                raise FractalError(f"{top / path}: {_what_instead(entry)}; remove it")
            else:
                yield path


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_image(path: str) -> bool:
    return path.lower().endswith(_EXTENSIONS) and not _hidden(path.rpartition("/")[2])


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _what_instead(entry: os.DirEntry[str]) -> str:
    try:
        return f"not a regular file ({stat.filemode(entry.stat().st_mode)})"
    except OSError:
        return "a link that leads nowhere"


def _check_text(folder: Path, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise FractalError(f"{folder}: the name of class folder {name!r} is not UTF-8; rename it") from error
