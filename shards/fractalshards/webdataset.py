"""WebDataset folders written by other programs: tars of images with ``cls`` labels and timm's ``_info.json``.

They have no sidecars: one scan of the headers of every tar finds the samples. The result is kept in the user's cache;
nothing is written into the folder.
"""

import io
import logging
import os
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from fractalshards.errors import FractalError
from fractalshards.human import human_count
from fractalshards.manifest import INFO, MAX_SAMPLE_BYTES, Count, check_plain
from fractalshards.storage import atomic_file, read_json, regular_size
from fractalshards.workers import available_cores, worker_pool

_log = logging.getLogger(__name__)

_VERSION = 1  # of the cached files
_IMAGES = ("jpg", "jpeg", "png", "webp")  # if a sample has several, the first of these is its image
_LABEL = "cls"
_MAX_LABEL_BYTES = 20
_MAX_HEADER_BYTES = 1 << 20  # with the long names and other fields of GNU and pax headers
_MAX_DIGITS = 9
_FEW_TARS = 4  # are scanned in less time than worker processes take to start

Positions = npt.NDArray[np.int64]


class _Split(msgspec.Struct, frozen=True):
    filenames: tuple[str, ...]
    shard_lengths: tuple[Count, ...]


class _Info(msgspec.Struct, frozen=True):
    splits: dict[str, _Split]
    num_classes: Count | None = None


@dataclass(frozen=True)
class WebDatasetInfo:
    """``_info.json`` of a folder.

    Attributes:
        splits: by name, the tars and how many samples each must have.
        classes: their number, or None if the file does not say.
    """

    folder: Path
    splits: Mapping[str, tuple[tuple[Path, int], ...]]
    classes: int | None


@dataclass(frozen=True)
class TarIndex:
    """The samples of a tar, as arrays with an entry per sample except for ``keys``.

    Attributes:
        starts: first byte of the image, int64.
        sizes: size of the image in bytes, int64.
        labels: class indices, int64.
        keys: the concatenated keys in UTF-8, (bytes,) uint8.
        key_ends: end of each key in ``keys``, int64.
    """

    starts: Positions
    sizes: Positions
    labels: Positions
    keys: npt.NDArray[np.uint8]
    key_ends: Positions

    def __len__(self) -> int:
        return len(self.starts)

    def key(self, sample: int) -> str:
        """Return the common name of a sample's members, folders included."""
        start = int(self.key_ends[sample - 1]) if sample else 0
        return self.keys[start : int(self.key_ends[sample])].tobytes().decode()


def is_webdataset(folder: Path) -> bool:
    """Return whether a folder has an ``_info.json`` that another program wrote.

    Raises:
        FractalError: if the file is not a JSON object.
    """
    path = folder / INFO
    return path.is_file() and "format_version" not in read_json(path, dict[str, Any])


def load_webdataset(folder: Path) -> WebDatasetInfo:
    """Read and check ``_info.json`` as timm writes it.

    Raises:
        FractalError: if a field is missing or wrong, or a name could lead out of the folder.
    """
    path = folder / INFO
    info = read_json(path, _Info)
    splits = {}
    for name, split in info.splits.items():
        if len(split.filenames) != len(split.shard_lengths):
            raise FractalError(f"{path}: {name}: filenames and shard_lengths differ in length; fetch it again")
        tars = (folder.joinpath(*(check_plain(part, str(path)) for part in tar.split("/"))) for tar in split.filenames)
        splits[name] = tuple(zip(tars, split.shard_lengths, strict=True))
    return WebDatasetInfo(folder, splits, info.num_classes)


def index_tars(tars: Iterable[tuple[Path, int]]) -> tuple[TarIndex, ...]:
    """Return the indices of tars in order, from the cache or by scanning the tars in worker processes.

    Args:
        tars: paths, and how many samples each must have.

    Raises:
        FractalError: if a tar is not a plain tar, lacks a label or an image, or has another number of samples.
        OSError: if a tar cannot be read.
    """
    wanted = tuple(tars)
    known = {path: index for path, _ in wanted if (index := _read_cache(path)) is not None}
    unknown = [path for path, _ in wanted if path not in known]
    if unknown:
        _log.info("indexing %s of %s, once", human_count(len(unknown), "tar"), unknown[0].parent)
        known |= _scan_all(unknown)
    for path, samples in wanted:
        if (found := len(known[path])) != samples:
            raise FractalError(f"{path}: holds {found} samples, but {INFO} says {samples}; fetch it again")
    return tuple(known[path] for path, _ in wanted)


def index_digest(indices: Iterable[TarIndex]) -> str:
    """Return 32 hexadecimal digits over keys, labels, positions and sizes, which identify the dataset."""
    state = xxhash.xxh3_128()
    for index in indices:
        for array in astuple(index):
            state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()


def index_tar(path: Path) -> TarIndex:
    """Find the samples of a tar by its headers (ustar, GNU or pax); files other than images and ``cls`` are ignored.

    The members of a sample are adjacent and share their name up to its first dot.

    Raises:
        FractalError: if it is not a plain tar, ends early, or a sample lacks image or label.
        OSError: if it cannot be read.
    """
    samples = list(_samples(path))
    keys = [key.encode(errors="replace") for key, *_ in samples]
    table = np.array([numbers for _, *numbers in samples], np.int64).reshape(-1, 3)
    return TarIndex(
        starts=table[:, 0].copy(),
        sizes=table[:, 1].copy(),
        labels=table[:, 2].copy(),
        keys=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
    )


def _scan_all(paths: list[Path]) -> dict[Path, TarIndex]:
    if len(paths) <= _FEW_TARS:
        return dict(map(_scan_and_keep, paths))
    with worker_pool(available_cores()) as pool:
        return dict(pool.map(_scan_and_keep, paths))


def _scan_and_keep(path: Path) -> tuple[Path, TarIndex]:
    index = index_tar(path)
    with suppress(OSError):  # without a cache, it is scanned again the next time
        kept = _cache_path(path)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(kept) as file:
            np.savez(file, *astuple(index))
    return path, index


def _read_cache(path: Path) -> TarIndex | None:
    """Return the cached index of a tar with this path, size and modification time, if there is a sound one."""
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with np.load(_cache_path(path), allow_pickle=False) as arrays:
            index = TarIndex(*(arrays[f"arr_{number}"] for number in range(5)))
        if _is_sound(index):
            return index
    return None


def _is_sound(index: TarIndex) -> bool:
    columns = (index.starts, index.sizes, index.labels, index.key_ends)
    return (
        all(column.dtype == np.int64 and column.shape == index.starts.shape for column in columns)
        and index.keys.dtype == np.uint8
        and len(index.keys) == (index.key_ends[-1] if len(index) else 0)
    )


def _cache_path(path: Path) -> Path:
    """Return the path of the cached index, below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    status = path.stat()
    identity = f"{_VERSION}\0{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    return root / "fractalpretrain" / "listings" / f"{xxhash.xxh3_128_hexdigest(identity.encode())}.npz"


def _samples(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """Yield key, start and size of the image, and label of each sample of a tar."""
    size = regular_size(path)
    with path.open("rb") as file:
        named = ((*_parse_name(member.name), member) for member in _regular_files(path, file.fileno()))
        for key, members in groupby(named, itemgetter(0)):
            found: dict[str, tarfile.TarInfo] = {}
            for _, extension, member in members:
                if extension not in (*_IMAGES, _LABEL):
                    continue
                if extension in found:
                    raise FractalError(f"{path}: {key}.{extension} occurs twice in one sample; fetch the file again")
                if member.offset_data + member.size > size:
                    raise FractalError(f"{path}: {member.name} is cut off; fetch the file again")
                found[extension] = member
            if not found:
                continue
            image = next((found[extension] for extension in _IMAGES if extension in found), None)
            if image is None or _LABEL not in found:
                lacking = f".{_LABEL} file" if image else "image"
                raise FractalError(f"{path}: {key} has no {lacking}; every image needs one .{_LABEL} file")
            if image.size > MAX_SAMPLE_BYTES:
                raise FractalError(f"{path}: {image.name} is larger than {MAX_SAMPLE_BYTES >> 20} MiB; remove it")
            label = os.pread(file.fileno(), min(found[_LABEL].size, _MAX_LABEL_BYTES + 1), found[_LABEL].offset_data)
            if not (label.strip().isdigit() and len(label.strip()) <= _MAX_DIGITS):
                raise FractalError(f"{path}: {key}: label {label[:_MAX_LABEL_BYTES]!r} is not a class index")
            yield key, image.offset_data, image.size, int(label)


def _parse_name(name: str) -> tuple[str, str]:
    """Return key and extension of a member; the extension is empty for hidden files."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower() if stem else ""


class _HeaderFile(io.FileIO):
    """A tar whose headers alone are read; ``tarfile`` would read long names of any size into memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _regular_files(path: Path, descriptor: int) -> Iterator[tarfile.TarInfo]:
    try:
        with _HeaderFile(os.dup(descriptor)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.size < 0:  # some versions of Python would read such a tar forever
                    raise FractalError(f"{path}: {member.name} has a negative size; do not use this dataset")
                if member.isreg() and not member.issparse():
                    yield member
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise FractalError(f"{path}: not a plain tar ({error}); fetch it again, or decompress it") from error
