"""List images to pack or to train on, with their classes: those of a folder ``CLASS/*`` or ``SPLIT/CLASS/*``, and those
of ImageNet (ILSVRC2012), read in place in the three archives that its site offers.
"""

import gzip
import io
import os
import re
import tarfile
import zlib
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from fractalshards.errors import FractalError, needs_extra
from fractalshards.human import human_count
from fractalshards.manifest import MAX_CLASSES, MAX_SAMPLE_BYTES
from fractalshards.sample import Member, scan_members
from fractalshards.storage import read_bounded

Indices = npt.NDArray[np.int64]

_SYNSET = re.compile(r"n\d{8}", re.ASCII)
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as torchvision's
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "#recycle", "lost+found", "$RECYCLE.BIN", "System Volume Information")
_LAYOUT = "images belong in PATH/CLASS/, or in PATH/train/CLASS/ and PATH/val/CLASS/"


def parse_place(text: str, kinds: Collection[str]) -> tuple[str, Path] | None:
    """Split ``KIND:PATH`` and expand ``~``, which shells do only at the start of a word; None for any other text."""
    kind, _, path = text.partition(":")
    return (kind, Path(os.path.expanduser(path))) if kind in kinds and path else None


@dataclass(frozen=True)
class ImageFiles:
    """Images of a split: files below a folder, or members of a tar."""

    root: Path  # the folder or the tar
    names: tuple[str, ...]  # paths below ``root``, or names in the tar
    labels: Indices  # (n,) class indices
    ranges: Indices | None = None  # (n, 2), start and size of each member of the tar in bytes

    def take(self, positions: Indices) -> "ImageFiles":
        """Select images by position, in the order given."""
        names = tuple(self.names[position] for position in positions.tolist())
        ranges = None if self.ranges is None else self.ranges[positions]
        return ImageFiles(self.root, names, self.labels[positions], ranges)

    def location(self, position: int) -> str:
        """Say where an image is, for messages."""
        return str(self.root / self.names[position]) if self.ranges is None else f"{self.root}: {self.names[position]}"

    def read(self, position: int) -> bytes:
        """Read an image file; raises FractalError if it is truncated or larger than a sample may be."""
        if self.ranges is None:
            with (self.root / self.names[position]).open("rb") as file:
                data = file.read(MAX_SAMPLE_BYTES + 1)
            size = len(data)
        else:
            start, size = self.ranges[position].tolist()
            data = os.pread(_open(self.root), min(size, MAX_SAMPLE_BYTES + 1), start)
        if size > MAX_SAMPLE_BYTES:
            raise FractalError(f"larger than {MAX_SAMPLE_BYTES >> 20} MiB, too large for a sample")
        if len(data) != size:
            raise FractalError(f"truncated after {len(data)} of {size} bytes")
        return data


@dataclass(frozen=True)
class ImageListing:
    """The images of a source, before a share is held out; names and ids of classes are by index, or empty."""

    classes: int
    class_names: tuple[str, ...]
    class_ids: tuple[str, ...]
    splits: Mapping[str, ImageFiles]  # ``train`` and perhaps ``val``
    notes: tuple[str, ...] = ()  # for the user: what was left out

    def digest(self) -> str:
        """Return 32 hexadecimal digits that identify splits, classes and file names, wherever the files are."""
        state = xxhash.xxh3_128()
        for split, images in self.splits.items():
            for name, label in zip(images.names, images.labels.tolist(), strict=True):
                folder = "" if images.ranges is None else f"{self.class_ids[label]}/"
                state.update(os.fsencode(f"{split}/{folder}{name}") + b"\0")
        return state.hexdigest()

    def without(self, bad: Mapping[str, Sequence[int]]) -> "ImageListing":
        """Leave out images by split and position; raises FractalError if a class would lose all images of a split."""
        splits = {}
        for split, images in self.splits.items():
            splits[split] = images.take(np.delete(np.arange(len(images.labels)), bad[split]))
            if (lost := np.setdiff1d(images.labels, splits[split].labels)).size:
                name = (self.class_ids or self.class_names)[lost[0]]
                raise FractalError(f"{images.root}: all images of class {name} are bad; replace or remove them")
        return replace(self, splits=splits)


def has_splits(path: Path) -> bool:
    """Return whether an image folder is ``train/CLASS/*``; a folder ``train`` without subfolders is a class."""
    return (path / "train").is_dir() and bool(_class_folders(path / "train"))


def list_folder(path: Path, folders: Mapping[str, str] | None = None) -> ImageListing:
    """List the images of each split of an image folder; every split must have images of the same classes.

    Symbolic links are followed. Hidden files and folders, folders of file systems such as ``@eaDir``, and files without
    an image extension are left out. ``folders`` names the folder below ``path`` for each split; by default ``train``
    and ``val`` if they exist, else all images are in split ``train``.
    """
    are_named = folders is not None
    if folders is None:
        found = ("train", "val") if has_splits(path) else ()
        folders = {name: name for name in found if (path / name).is_dir()} or {"train": ""}
    listed = {split: _list_split(path / name, split) for split, name in folders.items()}
    splits = {split: images for split, (_, images, _) in listed.items()}
    classes, *others = (names for names, _, _ in listed.values())
    if others and others[0] != classes:
        different = ", ".join(map(ascii, sorted({*classes} ^ {*others[0]})[:5]))  # some letters look like others
        raise FractalError(f"{path}: train and val have different class folders ({different}); make them equal")
    notes = []
    if not are_named and folders == {"train": "train"}:
        notes.append(f"no folder val in {path}, so no split val; name the folders with --split train=DIR,val=DIR")
    if not are_named and all(name.count("/") > 1 for images in splits.values() for name in images.names):
        notes.append(
            f"all images are in subfolders of {classes[0]}, ...; if those folders are splits rather than classes, "
            "name them with --split train=DIR,val=DIR"
        )
    if skipped := sum(count for _, _, count in listed.values()):
        notes.append(
            f"{path}: skipped {human_count(skipped, 'item')}: hidden, outside of class folders, or not named as images"
        )
    names, ids = ((), classes) if all(map(_SYNSET.fullmatch, classes)) else (classes, ())
    return ImageListing(len(classes), names, ids, splits, tuple(notes))


def _list_split(folder: Path, split: str) -> tuple[tuple[str, ...], ImageFiles, int]:
    """Return the classes and the images in a folder, and the number of other files."""
    if not folder.is_dir():
        raise FractalError(f"{folder}: no such folder, so there are no images for {split}; {_LAYOUT}")
    classes = _class_folders(folder)
    if not 0 < len(classes) <= MAX_CLASSES:
        raise FractalError(f"{folder}: contains {human_count(len(classes), 'class folder')}; {_LAYOUT}")
    paths, labels = list[str](), list[int]()
    skipped = len(set(os.listdir(folder)) - {*classes})
    for label, name in enumerate(classes):
        files = list(_walk(folder, name, (folder.resolve(),)))
        images = sorted(file for file in files if _is_image(file))
        if not images:
            raise FractalError(f"{folder / name}: contains no image; add some or remove the folder")
        paths += images
        labels += [label] * len(images)
        skipped += len(files) - len(images)
    try:
        names = tuple(os.fsencode(name).decode() for name in classes)  # in UTF-8, whatever the locale
    except UnicodeDecodeError as error:
        raise FractalError(f"{folder}: the name of a folder, {error.object!r}, is not UTF-8; rename it") from error
    return names, ImageFiles(folder, tuple(paths), np.array(labels, np.int64)), skipped


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
            if entry.is_dir() and not _is_hidden(entry.name):
                yield from _walk(top, path, (*parents, folder))
            elif _is_image(path) and not entry.is_file():
                raise FractalError(f"{top / path}: neither a regular file nor a link to one; remove it")
            else:
                yield path


def _is_image(path: str) -> bool:
    return path.lower().endswith(_EXTENSIONS) and not _is_hidden(path.rpartition("/")[2])


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_FOLDERS


@lru_cache(maxsize=4)
def _open(path: Path) -> int:
    """Open a tar once per process: one open per image would burden a shared file system."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


TRAIN = "ILSVRC2012_img_train.tar"  # a tar of one tar per class
VAL = "ILSVRC2012_img_val.tar"  # flat
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"  # class names and validation labels

_CLASS_TAR = re.compile(r"(n\d{8})\.tar", re.ASCII)
_TRAIN_IMAGE = re.compile(r"(n\d{8})_\d+\.JPEG", re.ASCII)
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.ASCII)
_CLASSES = "data/meta.mat"
_VAL_LABELS = "data/ILSVRC2012_validation_ground_truth.txt"
_MAX_DEVKIT = 64 << 20  # bytes when unpacked
_ADVICE = "download the file again"


def list_ilsvrc(folder: Path, with_val: bool) -> ImageListing:
    """List the images by the headers of the tars, those of validation if ``with_val`` and their archive exists.

    Raises FractalError if an archive is missing, damaged, contains unexpected files, or contradicts the devkit.
    """
    for name in (TRAIN, DEVKIT):
        if not (folder / name).is_file():
            raise FractalError(f"{folder}: no {name}; download it, or pack unpacked images with imagefolder:PATH")
    names, val_synsets = _read_devkit(folder / DEVKIT)
    ids = tuple(sorted(names))
    labels = {synset: label for label, synset in enumerate(ids)}
    splits = {"train": _list_archive(folder / TRAIN, _train_members(folder / TRAIN), labels)}
    if missing := set(range(len(ids))) - set(np.unique(splits["train"].labels).tolist()):
        raise FractalError(f"{folder / TRAIN}: no images of class {ids[min(missing)]}; {_ADVICE}")
    notes = []
    if with_val and (folder / VAL).is_file():
        splits["val"] = _list_archive(folder / VAL, _val_members(folder / VAL, val_synsets), labels)
    elif with_val:
        notes.append(f"no {VAL} in {folder}, so no split val")
    class_names = tuple(names[synset] for synset in ids)
    return ImageListing(len(ids), class_names, ids, splits, tuple(notes))


def _list_archive(tar: Path, images: Iterator[tuple[str, Member]], labels: dict[str, int]) -> ImageFiles:
    names = []
    numbers = array("q")  # 1.3 million images: lists would take several times the memory
    for synset, member in images:
        if synset not in labels:
            raise FractalError(f"{tar}: contains class {synset}, which is not in {DEVKIT}; {_ADVICE}")
        names.append(member.name)
        numbers.extend((labels[synset], member.start, member.size))
    columns = np.asarray(numbers).reshape(-1, 3)
    return ImageFiles(tar, tuple(names), columns[:, 0], columns[:, 1:])


def _train_members(tar: Path) -> Iterator[tuple[str, Member]]:
    """Yield the synset id and location of every training image."""
    with tar.open("rb") as file:
        for synset, inner in _scan(file.fileno(), 0, tar.stat().st_size, str(tar), _CLASS_TAR):
            where = f"{tar}: {inner.name}"
            for found, member in _scan(file.fileno(), inner.start, inner.start + inner.size, where, _TRAIN_IMAGE):
                if found != synset:
                    raise FractalError(f"{where}: {member.name} belongs to another class; {_ADVICE}")
                yield synset, member


def _val_members(tar: Path, synsets: list[str]) -> Iterator[tuple[str, Member]]:
    """Yield the synset id and location of every validation image; ``synsets`` has the id of each by its number."""
    count = 0
    with tar.open("rb") as file:
        for number, member in _scan(file.fileno(), 0, tar.stat().st_size, str(tar), _VAL_IMAGE):
            if not 1 <= int(number) <= len(synsets):
                raise FractalError(f"{tar}: {member.name} has no label in {DEVKIT}; {_ADVICE}")
            count += 1
            yield synsets[int(number) - 1], member
    if count != len(synsets):
        raise FractalError(f"{tar}: {count:,} images, but {DEVKIT} has {len(synsets):,} labels; {_ADVICE}")


def _scan(descriptor: int, start: int, stop: int, where: str, pattern: re.Pattern[str]) -> Iterator[tuple[str, Member]]:
    """Yield the members of a tar inside an open file, each with the group of its name; a name may occur once."""
    seen: set[str] = set()
    try:
        for member in scan_members(descriptor, start, stop):
            match = pattern.fullmatch(member.name)
            if match is None or member.name in seen:
                raise FractalError(f"unexpected file {member.name!r}, or a second one of this name")
            seen.add(member.name)
            yield match[1], member
    except FractalError as error:
        raise FractalError(f"{where}: {error}; {_ADVICE}") from error


def _read_devkit(path: Path) -> tuple[dict[str, str], list[str]]:
    """Read class names by synset id, and the synset id of every validation image."""
    with needs_extra("imagenet", f"reading {DEVKIT}"):
        from scipy.io import loadmat
    packed = read_bounded(path, _MAX_DEVKIT)
    found: dict[str, bytes] = {}
    try:
        with gzip.open(io.BytesIO(packed)) as file:
            data = file.read(_MAX_DEVKIT + 1)
        if len(data) > _MAX_DEVKIT:
            raise ValueError(f"unpacks to more than {_MAX_DEVKIT >> 20} MiB")
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if member.size < 0 or member.issparse():  # would be read forever, or unpack to any size
                    raise ValueError(f"{member.name} is not a plain file")
                if member.isreg() and (content := tar.extractfile(member)):
                    found["/".join(member.name.split("/")[-2:])] = content.read()
    except (tarfile.TarError, zlib.error, EOFError, ValueError, RecursionError, gzip.BadGzipFile) as error:
        raise FractalError(f"{path}: damaged ({error}); {_ADVICE}") from error
    try:
        synsets = loadmat(io.BytesIO(found[_CLASSES]), squeeze_me=True)["synsets"]
        leaves = [synset for synset in np.atleast_1d(synsets) if int(synset["num_children"]) == 0]  # the classes
        ids = {int(leaf["ILSVRC2012_ID"]): str(leaf["WNID"]) for leaf in leaves}
        names = {str(leaf["WNID"]): str(leaf["words"]) for leaf in leaves}
        if not names or len(names) != len(leaves) or len(ids) != len(leaves) or not all(map(_SYNSET.fullmatch, names)):
            raise ValueError("classes are missing, repeated, or not named by synset ids")
        return names, [ids[int(number)] for number in found[_VAL_LABELS].decode("ascii").split()]
    except Exception as error:  # scipy does not document what it raises for damaged files
        raise FractalError(f"{path}: damaged ({type(error).__name__}: {error}); {_ADVICE}") from error
