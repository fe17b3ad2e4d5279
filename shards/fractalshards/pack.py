"""WordNet's identifiers of synsets, such as n01440764, by which ImageNet names its classes."""

import gzip
import io
import os
import re
import stat
import tarfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from fractalshards.errors import FractalError, UsageError, needs_extra
from fractalshards.human import human_count
from fractalshards.manifest import (
    MAX_CLASSES,
    MAX_SAMPLE_BYTES,
    MAX_SAMPLES,
    MAX_SHARD_SIZE,
    MAX_SHARDS,
    ShardRecord,
    claim_folder,
    refuse_other,
    sample_key,
    shard_name,
    stored_recipe,
)
from fractalshards.png import decode_image, encode_png
from fractalshards.random import GOLDEN64, MASK64
from fractalshards.sample import BLOCK, PNG, Member, Sample, encode_label, image_format, scan_members
from fractalshards.settings import nearest
from fractalshards.storage import remove_leftovers
from fractalshards.workers import OnProgress, no_progress, worker_pool
from fractalshards.writer import (
    Contents,
    Encoded,
    ShardTask,
    check_size,
    finished_shards,
    publish,
    refuse_vanished,
    run_jobs,
    write_samples,
)

_SYNSET = re.compile(r"n\d{8}", re.ASCII)


def are_synsets(names: Iterable[str]) -> bool:
    """Whether all names are identifiers of WordNet's nouns."""
    return all(_SYNSET.fullmatch(name) for name in names)


Indices = npt.NDArray[np.int64]


class Images(Protocol):
    """Image files in some order. Light and picklable, for parts of it travel to worker processes."""

    def __len__(self) -> int: ...

    def take(self, chosen: Indices) -> "Images":
        """Those at the given positions, in that order."""
        ...

    def name(self, index: int) -> str:
        """Where a file is, for people."""
        ...

    def read(self, index: int) -> bytes:
        """The bytes of a file.

        Raises:
            FractalError: if it is cut off, or larger than a sample may be.
            OSError: if it cannot be read.
        """
        ...


@dataclass(frozen=True)
class Part:
    """The images of a split; ``labels`` is (n,) int64, their class indices."""

    images: Images
    labels: Indices

    def take(self, chosen: Indices) -> "Part":
        """Those at the given positions, in that order."""
        return Part(self.images.take(chosen), self.labels[chosen])


@dataclass(frozen=True)
class ImageListing:
    """All there is to pack.

    ``parts`` has ``train`` and perhaps ``val``; names and ids are by class index, or empty. ``digest`` identifies the
    list: 32 hexadecimal digits over splits, classes and names of files, wherever they lie. ``notes`` tell what was
    left out.
    """

    classes: int
    class_names: tuple[str, ...]
    class_ids: tuple[str, ...]
    parts: Mapping[str, Part]
    digest: str
    notes: Sequence[str] = ()


def shuffled(count: int, seed: int, purpose: str) -> Indices:
    """A pseudorandom permutation of range(count): the order of the outputs of splitmix64, (count,) int64."""
    key = xxhash.xxh3_64_intdigest(f"{purpose} {seed}".encode())
    words = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN64) + np.uint64(key & MASK64)
    return np.argsort(_mix(words), kind="stable")


def deal(part: Part, share: Fraction, seed: int) -> Mapping[str, Part]:
    """Split images into ``train`` and ``val``: of every class a share, rounded, goes to val, but never all.

    Raises:
        FractalError: if no class has enough images to give one.
    """
    order = shuffled(len(part.labels), seed, "deal")
    order = order[np.argsort(part.labels[order], kind="stable")]  # class after class, each shuffled
    counts = np.bincount(part.labels)
    held_out = np.zeros(len(order), bool)
    for first, count in zip(np.cumsum(counts) - counts, counts.tolist(), strict=True):
        held_out[first : first + min(int(count * share + Fraction(1, 2)), count - 1)] = True
    if not held_out.any():
        raise FractalError(f"a share of {float(share)} is no image of any class; raise the share of val")
    return {"train": part.take(np.sort(order[~held_out])), "val": part.take(np.sort(order[held_out]))}


def _mix(words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """``splitmix.mix64`` of many words."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


KINDS = ("imagefolder", "imagenet")
SPLITS = ("train", "val")
_NUMBER = re.compile(r"\d*\.?\d+", re.ASCII)
_SPLIT_ADVICE = "give shares as train=0.9,val=0.1 or folders as train=DIR,val=DIR"


@dataclass(frozen=True)
class Source:
    """Images to pack: ``val_share`` of every class are held out, or ``folders`` hold the splits, if either is given."""

    kind: str
    path: Path
    val_share: Fraction | None = None
    folders: Mapping[str, str] | None = None

    def list_images(self, out: Path) -> ImageListing:
        """List the images; dealing them to splits is left to do.

        Args:
            out: where shards will go: not into an image folder, where they would be taken for a class.

        Raises:
            FractalError: if the source is not as it should be.
            OSError: if it cannot be read.
        """
        if self.kind == "imagenet":
            return list_ilsvrc(self.path, with_val=self.val_share is None)
        if not self.path.is_dir():
            raise FractalError(f"{self.path}: no such folder; give the folder that holds the images")
        if out.resolve().is_relative_to(self.path.resolve()):
            raise FractalError(f"{out}: lies in the image folder {self.path}; choose a folder outside of it")
        if self.val_share is not None and holds_splits(self.path):
            raise UsageError(f"shares are for PATH/CLASS/*, but {self.path} holds train/CLASS/*; give its folder train")
        return list_folder(self.path, self.folders)


def parse_source(text: str, split: str | None) -> Source:
    """A source from ``KIND:PATH`` and the text of ``--split``.

    Raises:
        UsageError: if either is malformed, or they do not fit each other.
    """
    kind, colon, place = text.partition(":")
    if not (colon and place):
        raise UsageError(f"{text!r}: expected {' or '.join(f'{one}:PATH' for one in KINDS)}")
    if kind not in KINDS:
        raise UsageError(f"unknown source {kind!r}{nearest(kind, KINDS)}")
    path = Path(os.path.expanduser(place))  # shells leave a ~ alone that does not come first
    if split is None:
        return Source(kind, path)
    values = _parse_split(split)
    if not all(_NUMBER.fullmatch(value) for value in values.values()):
        if kind == "imagenet":
            raise UsageError(f"--split {split}: ImageNet's archives are no folders; give shares as train=0.98,val=0.02")
        return Source(kind, path, folders=values)
    shares = {name: Fraction(value) for name, value in values.items()}
    if sum(shares.values()) != 1 or set(shares) != set(SPLITS) or not all(shares.values()):
        raise UsageError(
            f"--split {split}: shares of train and val must be above 0 and add up to 1; "
            "write a folder that is named by a number as ./2012"
        )
    return Source(kind, path, val_share=shares["val"])


def _parse_split(text: str) -> dict[str, str]:
    """``train=A,val=B`` as a mapping, train first."""
    pairs = [part.strip().partition("=") for part in text.split(",")]
    values = {name: value for name, _, value in pairs}
    if len(values) != len(pairs) or not all(values.values()) or "train" not in values or not set(values) <= set(SPLITS):
        raise UsageError(f"--split {text}: {_SPLIT_ADVICE}")
    if len({bool(_NUMBER.fullmatch(value)) for value in values.values()}) != 1:
        raise UsageError(f"--split {text}: a share and a folder; {_SPLIT_ADVICE}")
    return {name: values[name] for name in SPLITS if name in values}


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


RECIPE_VERSION = 1  # raised whenever another dataset is made of the same files
_PACK_ADVICE = "replace {them} and run the same command again, or remove {them} and pack into a new folder"
_NAMED = 10  # of the images that cannot be packed


@dataclass(frozen=True)
class PackRecipe:
    """What a packed dataset is: equal recipes of files with equal bytes give equal samples.

    Attributes:
        kind: of the source, ``imagefolder`` or ``imagenet``.
        n: samples of the split ``train``.
        val: samples of the split ``val``.
        classes: number of classes.
        seed: of the order of the images, and of which are held out.
        shard_size: samples per shard.
        val_share: of the images of every class, if they were dealt to the splits; else None.
        files: digest of the list of files.
    """

    kind: str
    n: int
    val: int
    classes: int
    seed: int
    shard_size: int
    val_share: float | None
    files: str
    version: int = RECIPE_VERSION

    def __post_init__(self) -> None:
        if not 1 <= self.shard_size <= MAX_SHARD_SIZE:
            raise UsageError(f"shard_size is {self.shard_size}: a shard has 1 to {MAX_SHARD_SIZE:,} samples")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}: it may be 0 to 2**63 - 1")
        if self.n + self.val > MAX_SAMPLES:
            raise UsageError(f"{self.n + self.val:,} images are over {MAX_SAMPLES:,}: pack several datasets")
        if (shards := (self.n + self.val) // self.shard_size) > MAX_SHARDS:
            raise UsageError(f"{shards:,} shards are too many for a manifest: raise shard_size")


@dataclass(frozen=True)
class PackPlan:
    """A packing that is ready to run: what there is, and what is done already."""

    folder: Path
    contents: Contents
    parts: Mapping[ShardTask, Part]
    finished: Mapping[str, ShardRecord]
    notes: tuple[str, ...]

    def missing(self) -> tuple[ShardTask, ...]:
        """The shards that are not finished."""
        return tuple(task for task in self.parts if task.name not in self.finished)


def plan_pack(folder: Path, source: Source, seed: int, shard_size: int) -> PackPlan:
    """List the images, look at the folder and find out what is to be done; nothing but leftovers is removed or written.

    Raises:
        FractalError: if the source is not as it should be, or the folder holds something else.
        OSError: if either cannot be read.
    """
    found = stored_recipe(folder)
    listing = source.list_images(folder)
    parts = listing.parts if source.val_share is None else deal(listing.parts["train"], source.val_share, seed)
    recipe = PackRecipe(
        kind=source.kind,
        n=len(parts["train"].labels),
        val=len(parts["val"].labels) if "val" in parts else 0,
        classes=listing.classes,
        seed=seed,
        shard_size=shard_size,
        val_share=None if source.val_share is None else float(source.val_share),
        files=listing.digest,
    )
    contents = _contents(recipe, listing)
    if found is not None:
        refuse_other(folder, found, contents.recipe)
        remove_leftovers(folder)
    tasks = _tasks(parts, recipe)
    return PackPlan(folder, contents, tasks, finished_shards(folder, tuple(tasks), contents), tuple(listing.notes))


def run_pack(plan: PackPlan, workers: int, on_progress: OnProgress = no_progress) -> None:
    """Write the missing shards, then the manifest unless it is there, with so many worker processes.

    Every image is decoded once; all others are still packed where some cannot be, so that all are named.

    Raises:
        FractalError: naming the images that cannot be packed; if a worker process was killed, shards vanished, or
            another build has claimed the folder since it was looked at.
        OSError: as the file system does; shards that are finished stay.
    """
    claim_folder(plan.folder, plan.contents.recipe)
    complaints: list[str] = []
    jobs = {
        task: partial(pack_shard, plan.folder, task, plan.parts[task], plan.contents.classes) for task in plan.missing()
    }
    with worker_pool(workers) as pool:
        for bad_images in run_jobs(jobs, pool, plan.folder, on_progress):
            complaints += bad_images
    if complaints:
        raise FractalError(_complain(sorted(complaints)))
    refuse_vanished(plan.folder, publish(plan.folder, tuple(plan.parts), plan.contents))


def pack_shard(folder: Path, task: ShardTask, part: Part, classes: int) -> tuple[str, ...]:
    """Write one shard; if images cannot be decoded, write nothing and say which, and why."""
    try:
        write_samples(folder, task.name, classes, _samples(task, part))
    except _BadImagesError as error:
        return error.complaints
    return ()


class _BadImagesError(FractalError):
    """Images of a shard cannot be packed."""

    def __init__(self, complaints: Iterable[str]) -> None:
        self.complaints = tuple(complaints)


def _samples(task: ShardTask, part: Part) -> Iterable[Encoded]:
    complaints = []
    for place, label in enumerate(part.labels.tolist()):
        try:
            encoded = encode_file(sample_key(task.first + place), part.images.read(place), label)
        except FractalError as error:
            complaints.append(f"{part.images.name(place)}: {error}")
        else:
            yield encoded
    if complaints:
        raise _BadImagesError(complaints)


def encode_file(key: str, data: bytes, label: int) -> Encoded:
    """The sample of an image file: its bytes as they are, or a PNG of its pixels if shards do not hold its format.

    Raises:
        FractalError: if it cannot be decoded, or the sample would be larger than readers take.
    """
    pixels = decode_image(data)
    extension = image_format(data)
    image = {extension: data} if extension else {PNG: encode_png(pixels)}
    name, text = encode_label(label)
    sample = Sample(key, {**image, name: text})
    check_size(sample)
    return Encoded(sample, pixels, label)


def _contents(recipe: PackRecipe, listing: ImageListing) -> Contents:
    return Contents(asdict(recipe), "single", recipe.classes, listing.class_names, listing.class_ids)


def _tasks(parts: Mapping[str, Part], recipe: PackRecipe) -> dict[ShardTask, Part]:
    """Every shard and its images: those of a split in a seeded order, which mixes the classes, cut into shards."""
    tasks = {}
    first = 0
    for split, part in parts.items():
        count = len(part.labels)
        mixed = part.take(shuffled(count, recipe.seed, split))
        for shard, begin in enumerate(range(0, count, recipe.shard_size)):
            stop = min(begin + recipe.shard_size, count)
            task = ShardTask(split, shard_name(split, shard), first + begin, first + stop)
            tasks[task] = mixed.take(np.arange(begin, stop))
        first += count
    return tasks


def _complain(complaints: list[str]) -> str:
    if len(complaints) == 1:
        return f"{complaints[0]}; {_ADVICE.format(them='it')}"
    named = "; ".join(complaints[:_NAMED])
    more = f"; and {len(complaints) - _NAMED:,} more" if len(complaints) > _NAMED else ""
    return f"{len(complaints):,} images cannot be packed: {named}{more}; {_ADVICE.format(them='them')}"
