"""Lists the original archives of ILSVRC2012, ImageNet's 1000 classes, in place: nothing is unpacked.

Deng et al., CVPR 2009; Russakovsky et al., IJCV 2015. Classes are numbered by their synset ids in order, as everywhere.
"""

import gzip
import io
import os
import re
import tarfile
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from fractalshards.errors import FractalError
from fractalshards.extras import needs_extra
from fractalshards.manifest import MAX_SAMPLE_BYTES
from fractalshards.packing.listing import ImageListing, Indices, Part
from fractalshards.packing.wordnet import are_synsets
from fractalshards.tarball import BLOCK, Member, scan_members

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"

_CLASS_TAR = re.compile(r"(n\d{8})\.tar", re.ASCII)
_TRAIN_IMAGE = re.compile(r"(n\d{8})_\d+\.JPEG", re.ASCII)
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.ASCII)
_SYNSETS = "data/meta.mat"
_VAL_LABELS = "data/ILSVRC2012_validation_ground_truth.txt"
_MAX_DEVKIT = 64 << 20
_ADVICE = "fetch the file again"


@dataclass(frozen=True)
class TarImages:
    """Image files that lie uncompressed in one file: ``starts`` and ``sizes``, (n,) int64, in bytes."""

    tar: Path
    starts: Indices
    sizes: Indices

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, chosen: Indices) -> "TarImages":
        """Those at the given positions, in that order."""
        return TarImages(self.tar, self.starts[chosen], self.sizes[chosen])

    def name(self, index: int) -> str:
        """The tar, and the name in the header before the image."""
        header = os.pread(_descriptor(self.tar), BLOCK, int(self.starts[index]) - BLOCK)
        name = header[: tarfile.LENGTH_NAME].split(b"\0")[0].decode("ascii", "replace")
        return f"{self.tar}: {name}"

    def read(self, index: int) -> bytes:
        """The bytes of a file; see ``Images``."""
        size = int(self.sizes[index])
        if size > MAX_SAMPLE_BYTES:
            raise FractalError(f"larger than {MAX_SAMPLE_BYTES >> 20} MiB, too large for a sample")
        data = os.pread(_descriptor(self.tar), size, int(self.starts[index]))
        if len(data) != size:
            raise FractalError(f"cut off after {len(data)} of {size} bytes")
        return data


@dataclass(frozen=True)
class _Devkit:
    """Names by synset id, the id of each class number, and the class number of every validation image in order."""

    names: dict[str, str]
    ids: dict[int, str]
    val_labels: tuple[int, ...]


def list_ilsvrc(folder: Path, with_val: bool) -> ImageListing:
    """List the images of the archives from their headers, in one pass.

    Args:
        folder: holds ``TRAIN``, ``DEVKIT`` and perhaps ``VAL``, under these names.
        with_val: whether to list the validation images, if their archive is there.

    Raises:
        FractalError: if an archive is missing, damaged, holds what it should not, or contradicts another.
        OSError: if one cannot be read.
    """
    if not folder.is_dir():
        raise FractalError(f"{folder}: no such folder; it should hold {TRAIN}, {DEVKIT} and perhaps {VAL}")
    for name in (TRAIN, DEVKIT):
        if not (folder / name).is_file():
            raise FractalError(f"{folder}: no {name}; fetch it, or pack unpacked images with imagefolder:PATH")
    devkit = _read_devkit(folder / DEVKIT)
    classes = tuple(sorted(devkit.names))
    numbers = {synset: label for label, synset in enumerate(classes)}
    digest = xxhash.xxh3_128()
    parts = {"train": _part(folder / TRAIN, _train_images(folder / TRAIN), "train", numbers, digest)}
    if missing := set(range(len(classes))) - set(np.unique(parts["train"].labels).tolist()):
        raise FractalError(f"{folder / TRAIN}: no images of class {classes[min(missing)]}; {_ADVICE}")
    notes = []
    if with_val and (folder / VAL).is_file():
        parts["val"] = _part(folder / VAL, _val_images(folder / VAL, devkit), "val", numbers, digest)
    elif with_val:
        notes.append(f"no {VAL} in {folder}, so no split val")
    return ImageListing(
        classes=len(classes),
        class_names=tuple(devkit.names[synset] for synset in classes),
        class_ids=classes,
        parts=parts,
        digest=digest.hexdigest(),
        notes=notes,
    )


def _part(
    tar: Path, images: Iterator[tuple[str, Member]], split: str, numbers: dict[str, int], digest: xxhash.xxh3_128
) -> Part:
    starts, sizes, labels = array("q"), array("q"), array("q")  # lists would take four times the memory
    for synset, member in images:
        if synset not in numbers:
            raise FractalError(f"{tar}: holds class {synset}, which {DEVKIT} does not know; {_ADVICE}")
        digest.update(f"{split}/{synset}/{member.name}\0".encode())
        starts.append(member.start)
        sizes.append(member.size)
        labels.append(numbers[synset])
    return Part(TarImages(tar, np.asarray(starts), np.asarray(sizes)), np.asarray(labels))


def _train_images(tar: Path) -> Iterator[tuple[str, Member]]:
    """Synset id and place of every training image: the archive holds a tar for every class."""
    with tar.open("rb") as file:
        for inner in _scan(file, 0, tar.stat().st_size, str(tar)):
            synset = _match(_CLASS_TAR, inner.name, str(tar), "the tar of a class")
            where = f"{tar}: {inner.name}"
            for member in _scan(file, inner.start, inner.start + inner.size, where):
                if _match(_TRAIN_IMAGE, member.name, where, "an image of the class") != synset:
                    raise FractalError(f"{where}: {member.name} belongs to another class; {_ADVICE}")
                yield synset, member


def _val_images(tar: Path, devkit: _Devkit) -> Iterator[tuple[str, Member]]:
    """Synset id and place of every validation image: the archive is flat, the devkit has the labels."""
    expected = len(devkit.val_labels)
    found = 0
    with tar.open("rb") as file:
        for member in _scan(file, 0, tar.stat().st_size, str(tar)):
            number = int(_match(_VAL_IMAGE, member.name, str(tar), "a validation image"))
            if not 1 <= number <= expected:
                raise FractalError(f"{tar}: {member.name} has no label in {DEVKIT}; {_ADVICE}")
            found += 1
            yield devkit.ids[devkit.val_labels[number - 1]], member
    if found != expected:
        raise FractalError(f"{tar}: {found:,} images, but {DEVKIT} has {expected:,} labels; {_ADVICE}")


def _scan(file: BinaryIO, start: int, stop: int, where: str) -> Iterator[Member]:
    """The members of a tar inside a file, each name once."""
    seen: set[str] = set()
    try:
        for member in scan_members(file.fileno(), start, stop):
            if member.name in seen:
                raise FractalError(f"{member.name} is there twice")
            seen.add(member.name)
            yield member
    except FractalError as error:
        raise FractalError(f"{where}: {error}; {_ADVICE}") from error


def _match(pattern: re.Pattern[str], name: str, where: str, expected: str) -> str:
    if (match := pattern.fullmatch(name)) is None:
        raise FractalError(f"{where}: {name!r} is not the name of {expected}; {_ADVICE}")
    return match[1]


def _read_devkit(path: Path) -> _Devkit:
    files = _unpack_devkit(path)
    names, ids = _read_synsets(files[_SYNSETS], f"{path}: {_SYNSETS}")
    lines = files[_VAL_LABELS].decode("ascii", "replace").split()
    where = f"{path}: {_VAL_LABELS}"
    if odd := next((line for line in lines if not (line.isdecimal() and len(line) < 10 and int(line) in ids)), None):
        raise FractalError(f"{where}: {odd[:20]!r} is not the number of a class; {_ADVICE}")
    return _Devkit(names, ids, tuple(map(int, lines)))


def _unpack_devkit(path: Path) -> dict[str, bytes]:
    """The two files that count, by the ends of their names."""
    found: dict[str, bytes] = {}
    try:
        with gzip.open(path) as packed:
            data = packed.read(_MAX_DEVKIT + 1)
        if len(data) > _MAX_DEVKIT:
            raise FractalError(f"{path}: unpacks to more than {_MAX_DEVKIT >> 20} MiB, so it is not the devkit")
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                name = next((name for name in (_SYNSETS, _VAL_LABELS) if member.name.endswith("/" + name)), None)
                file = tar.extractfile(member) if name and member.isreg() else None
                if name and file:
                    found[name] = file.read()
    except (tarfile.TarError, zlib.error, EOFError, ValueError, RecursionError, gzip.BadGzipFile) as error:
        raise FractalError(f"{path}: damaged ({error}); {_ADVICE}") from error
    for name in (_SYNSETS, _VAL_LABELS):
        if name not in found:
            raise FractalError(f"{path}: no {name} in it; {_ADVICE}")
    return found


def _read_synsets(data: bytes, where: str) -> tuple[dict[str, str], dict[int, str]]:
    """Of the synsets without children, which are the classes: names by id, and ids by number."""
    with needs_extra("imagenet", f"reading {DEVKIT}"):
        from scipy.io import loadmat
    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        leaves = [synset for synset in np.atleast_1d(synsets) if int(synset["num_children"]) == 0]
        ids = {int(leaf["ILSVRC2012_ID"]): str(leaf["WNID"]) for leaf in leaves}
        names = {str(leaf["WNID"]): str(leaf["words"]) for leaf in leaves}
    except Exception as error:  # scipy does not say what it raises for damaged files
        raise FractalError(f"{where}: damaged ({error}); {_ADVICE}") from error
    if not names or len(names) != len(leaves) or len(ids) != len(leaves) or not are_synsets(names):
        raise FractalError(f"{where}: classes are missing, there twice, or not named as synsets; {_ADVICE}")
    return names, ids


@lru_cache(maxsize=4)
def _descriptor(path: Path) -> int:
    """The file, kept open by a worker: opening it for every image would burden a shared file system."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
