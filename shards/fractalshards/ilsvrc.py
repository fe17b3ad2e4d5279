"""List and read the images of ImageNet (ILSVRC2012) in place, in the three archives that its site offers."""

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

import numpy as np
import xxhash

from fractalshards.errors import FractalError, needs_extra
from fractalshards.imagefolder import TOO_LARGE, ImageListing, Indices, are_synsets
from fractalshards.manifest import MAX_SAMPLE_BYTES
from fractalshards.sample import BLOCK, Member, scan_members

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


@dataclass(frozen=True)
class TarImages:
    """Images stored uncompressed in one file; ``starts`` and ``sizes`` are (n,) int64, in bytes. See ``Images``."""

    tar: Path
    starts: Indices
    sizes: Indices
    labels: Indices

    def take(self, positions: Indices) -> "TarImages":
        return TarImages(self.tar, self.starts[positions], self.sizes[positions], self.labels[positions])

    def name(self, position: int) -> str:
        header = os.pread(_open(self.tar), BLOCK, int(self.starts[position]) - BLOCK)
        name = header[: tarfile.LENGTH_NAME].split(b"\0")[0].decode("ascii", "replace")
        return f"{self.tar}: {name}"

    def read(self, position: int) -> bytes:
        size = int(self.sizes[position])
        if size > MAX_SAMPLE_BYTES:
            raise FractalError(TOO_LARGE)
        data = os.pread(_open(self.tar), size, int(self.starts[position]))
        if len(data) != size:
            raise FractalError(f"truncated after {len(data)} of {size} bytes")
        return data


@dataclass(frozen=True)
class _Devkit:
    names: dict[str, str]  # class name by synset id
    ids: dict[int, str]  # synset id by the class number that validation labels use
    val_labels: tuple[int, ...]  # class number of each validation image


def list_ilsvrc(folder: Path, with_val: bool) -> ImageListing:
    """List the images from the tar headers alone.

    Args:
        folder: contains ``TRAIN``, ``DEVKIT`` and optionally ``VAL``.
        with_val: whether to list the validation images if their archive exists.

    Raises:
        FractalError: if an archive is missing, damaged, contains anything else, or contradicts the devkit.
        OSError: if an archive cannot be read.
    """
    for name in (TRAIN, DEVKIT):
        if not (folder / name).is_file():
            raise FractalError(f"{folder}: no {name}; download it, or pack unpacked images with imagefolder:PATH")
    devkit = _read_devkit(folder / DEVKIT)
    ids = tuple(sorted(devkit.names))
    labels = {synset: label for label, synset in enumerate(ids)}
    digest = xxhash.xxh3_128()
    splits = {"train": _collect(folder / TRAIN, _train_images(folder / TRAIN), "train", labels, digest)}
    if missing := set(range(len(ids))) - set(np.unique(splits["train"].labels).tolist()):
        raise FractalError(f"{folder / TRAIN}: no images of class {ids[min(missing)]}; {_ADVICE}")
    if with_val and (folder / VAL).is_file():
        splits["val"] = _collect(folder / VAL, _val_images(folder / VAL, devkit), "val", labels, digest)
    return ImageListing(
        classes=len(ids),
        class_names=tuple(devkit.names[synset] for synset in ids),
        class_ids=ids,
        splits=splits,
        digest=digest.hexdigest(),
        notes=(f"no {VAL} in {folder}, so no split val",) if with_val and "val" not in splits else (),
    )


def _collect(
    tar: Path, images: Iterator[tuple[str, Member]], split: str, labels: dict[str, int], digest: xxhash.xxh3_128
) -> TarImages:
    columns = array("q"), array("q"), array("q")  # 1.3 million images: lists would take four times the memory
    for synset, member in images:
        if synset not in labels:
            raise FractalError(f"{tar}: contains class {synset}, which is not in {DEVKIT}; {_ADVICE}")
        digest.update(f"{split}/{synset}/{member.name}\0".encode())
        for column, value in zip(columns, (member.start, member.size, labels[synset]), strict=True):
            column.append(value)
    return TarImages(tar, *map(np.asarray, columns))


def _train_images(tar: Path) -> Iterator[tuple[str, Member]]:
    """Yield the synset id and location of every training image."""
    with tar.open("rb") as file:
        for inner in _scan(file.fileno(), 0, tar.stat().st_size, str(tar)):
            synset = _match(_CLASS_TAR, inner.name, str(tar), "the tar of a class")
            where = f"{tar}: {inner.name}"
            for member in _scan(file.fileno(), inner.start, inner.start + inner.size, where):
                if _match(_TRAIN_IMAGE, member.name, where, "a training image") != synset:
                    raise FractalError(f"{where}: {member.name} belongs to another class; {_ADVICE}")
                yield synset, member


def _val_images(tar: Path, devkit: _Devkit) -> Iterator[tuple[str, Member]]:
    """Yield the synset id and location of every validation image."""
    expected, found = len(devkit.val_labels), 0
    with tar.open("rb") as file:
        for member in _scan(file.fileno(), 0, tar.stat().st_size, str(tar)):
            number = int(_match(_VAL_IMAGE, member.name, str(tar), "a validation image"))
            if not 1 <= number <= expected:
                raise FractalError(f"{tar}: {member.name} has no label in {DEVKIT}; {_ADVICE}")
            found += 1
            yield devkit.ids[devkit.val_labels[number - 1]], member
    if found != expected:
        raise FractalError(f"{tar}: {found:,} images, but {DEVKIT} has {expected:,} labels; {_ADVICE}")


def _scan(descriptor: int, start: int, stop: int, where: str) -> Iterator[Member]:
    """Yield the members of a tar inside an open file; each name may occur once."""
    seen: set[str] = set()
    try:
        for member in scan_members(descriptor, start, stop):
            if member.name in seen:
                raise FractalError(f"{member.name} occurs twice")
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
    for line in lines:
        if not (line.isdecimal() and len(line) < 10 and int(line) in ids):
            raise FractalError(f"{path}: {_VAL_LABELS}: {line[:20]!r} is not a class number; {_ADVICE}")
    return _Devkit(names, ids, tuple(map(int, lines)))


def _unpack_devkit(path: Path) -> dict[str, bytes]:
    """Read the two files that matter, keyed by the end of their names."""
    found: dict[str, bytes] = {}
    try:
        with gzip.open(path) as packed:
            data = packed.read(_MAX_DEVKIT + 1)
        if len(data) > _MAX_DEVKIT:
            raise FractalError(f"{path}: unpacks to more than {_MAX_DEVKIT >> 20} MiB, so it is not the devkit")
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                for name in (_SYNSETS, _VAL_LABELS):
                    if member.isreg() and member.name.endswith("/" + name) and (file := tar.extractfile(member)):
                        found[name] = file.read()
    except (tarfile.TarError, zlib.error, EOFError, ValueError, RecursionError, gzip.BadGzipFile) as error:
        raise FractalError(f"{path}: damaged ({error}); {_ADVICE}") from error
    for name in (_SYNSETS, _VAL_LABELS):
        if name not in found:
            raise FractalError(f"{path}: contains no {name}; {_ADVICE}")
    return found


def _read_synsets(data: bytes, where: str) -> tuple[dict[str, str], dict[int, str]]:
    """Read the classes, which are the synsets without children: names by id, ids by class number."""
    with needs_extra("imagenet", f"reading {DEVKIT}"):
        from scipy.io import loadmat
    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        leaves = [synset for synset in np.atleast_1d(synsets) if int(synset["num_children"]) == 0]
        ids = {int(leaf["ILSVRC2012_ID"]): str(leaf["WNID"]) for leaf in leaves}
        names = {str(leaf["WNID"]): str(leaf["words"]) for leaf in leaves}
    except Exception as error:  # scipy does not document what it raises for damaged files
        raise FractalError(f"{where}: damaged ({error}); {_ADVICE}") from error
    if not names or len(names) != len(leaves) or len(ids) != len(leaves) or not are_synsets(names):
        raise FractalError(f"{where}: classes are missing, repeated, or not named by synset ids; {_ADVICE}")
    return names, ids


@lru_cache(maxsize=4)
def _open(path: Path) -> int:
    """Open a file once per process: one open per image would burden a shared file system."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
