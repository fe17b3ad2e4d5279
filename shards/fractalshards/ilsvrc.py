"""List and read the images of ImageNet (ILSVRC2012) in place, in the three archives that its site offers."""

import gzip
import io
import re
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fractalshards.errors import FractalError, needs_extra
from fractalshards.imagefolder import ImageFiles, ImageListing, are_synsets
from fractalshards.sample import Member, scan_members

TRAIN = "ILSVRC2012_img_train.tar"  # a tar of one tar per class
VAL = "ILSVRC2012_img_val.tar"  # flat
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"  # class names and validation labels

_CLASS_TAR = re.compile(r"(n\d{8})\.tar", re.ASCII)
_TRAIN_IMAGE = re.compile(r"(n\d{8})_\d+\.JPEG", re.ASCII)
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.ASCII)
_SYNSETS = "data/meta.mat"
_VAL_LABELS = "data/ILSVRC2012_validation_ground_truth.txt"
_MAX_DEVKIT = 64 << 20
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
    splits = {"train": _list_split(folder / TRAIN, _train_images(folder / TRAIN), labels)}
    if missing := set(range(len(ids))) - set(np.unique(splits["train"].labels).tolist()):
        raise FractalError(f"{folder / TRAIN}: no images of class {ids[min(missing)]}; {_ADVICE}")
    notes = []
    if with_val and (folder / VAL).is_file():
        splits["val"] = _list_split(folder / VAL, _val_images(folder / VAL, val_synsets), labels)
    elif with_val:
        notes.append(f"no {VAL} in {folder}, so no split val")
    class_names = tuple(names[synset] for synset in ids)
    return ImageListing(len(ids), class_names, ids, splits, tuple(notes))


def _list_split(tar: Path, images: Iterator[tuple[str, Member]], labels: dict[str, int]) -> ImageFiles:
    names = []
    numbers = array("q")  # 1.3 million images: lists would take several times the memory
    for synset, member in images:
        if synset not in labels:
            raise FractalError(f"{tar}: contains class {synset}, which is not in {DEVKIT}; {_ADVICE}")
        names.append(member.name)
        numbers.extend((labels[synset], member.start, member.size))
    columns = np.asarray(numbers).reshape(-1, 3)
    return ImageFiles(tar, tuple(names), columns[:, 0], columns[:, 1:])


def _train_images(tar: Path) -> Iterator[tuple[str, Member]]:
    """Yield the synset id and location of every training image."""
    with tar.open("rb") as file:
        for synset, inner in _scan(file.fileno(), 0, tar.stat().st_size, str(tar), _CLASS_TAR):
            where = f"{tar}: {inner.name}"
            for found, member in _scan(file.fileno(), inner.start, inner.start + inner.size, where, _TRAIN_IMAGE):
                if found != synset:
                    raise FractalError(f"{where}: {member.name} belongs to another class; {_ADVICE}")
                yield synset, member


def _val_images(tar: Path, synsets: list[str]) -> Iterator[tuple[str, Member]]:
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
    found: dict[str, bytes] = {}
    try:
        with gzip.open(path) as packed:
            data = packed.read(_MAX_DEVKIT + 1)
        if len(data) > _MAX_DEVKIT:
            raise ValueError(f"unpacks to more than {_MAX_DEVKIT >> 20} MiB")
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                if member.size < 0 or member.issparse():  # would be read forever, or unpack to any size
                    raise ValueError(f"{member.name} is not a plain file")
                if member.isreg() and (file := tar.extractfile(member)):
                    found[member.name.partition("/")[2]] = file.read()
        synsets = loadmat(io.BytesIO(found[_SYNSETS]), squeeze_me=True)["synsets"]
        leaves = [synset for synset in np.atleast_1d(synsets) if int(synset["num_children"]) == 0]  # the classes
        ids = {int(leaf["ILSVRC2012_ID"]): str(leaf["WNID"]) for leaf in leaves}
        names = {str(leaf["WNID"]): str(leaf["words"]) for leaf in leaves}
        if not names or len(names) != len(leaves) or len(ids) != len(leaves) or not are_synsets(names):
            raise ValueError("classes are missing, repeated, or not named by synset ids")
        return names, [ids[int(number)] for number in found[_VAL_LABELS].decode("ascii").split()]
    except Exception as error:  # scipy does not document what it raises for damaged files
        raise FractalError(f"{path}: damaged ({type(error).__name__}: {error}); {_ADVICE}") from error
