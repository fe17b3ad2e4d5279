"""WebDataset folders of others: tars of images with ``cls`` labels, timm's ``_info.json``, and no sidecars.

Where the samples lie is found by one scan of the headers of every tar, which is kept in the user's cache: nothing is
written into a folder that is not ours.
"""

import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import as_completed
from contextlib import AbstractContextManager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from fractalshards.errors import FractalError
from fractalshards.fields import Fields
from fractalshards.manifest import INFO, check_plain
from fractalshards.storage import atomic_file
from fractalshards.workers import available_cores, worker_pool

_VERSION = 1  # of what is kept in the cache
_IMAGES = ("jpg", "jpeg", "png", "webp")  # of several, the first is taken
_LABEL = "cls"
_MAX_LABEL_BYTES = 20
_MAX_DIGITS = 9
_ALONE = 4  # so many tars are scanned before worker processes would have started

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ForeignInfo:
    """What ``_info.json`` of a foreign folder says.

    ``splits`` maps names to tars and how many samples each shall have; ``classes`` is None where it is not said.
    """

    folder: Path
    splits: Mapping[str, tuple[tuple[Path, int], ...]]
    classes: int | None


@dataclass(frozen=True)
class Listing:
    """The samples of a tar; arrays of n, but for the text of all keys.

    Attributes:
        starts: byte at which the image begins, int64.
        sizes: bytes of the image, int64.
        labels: class indices, int64.
        keys: the keys one after another, UTF-8, (bytes,) uint8.
        key_ends: where each ends, int64.
    """

    starts: Positions
    sizes: Positions
    labels: Positions
    keys: npt.NDArray[np.uint8]
    key_ends: Positions

    def __len__(self) -> int:
        return len(self.starts)

    def key(self, sample: int) -> str:
        """The name that the members of a sample have in common, with its folders."""
        start = int(self.key_ends[sample - 1]) if sample else 0
        return self.keys[start : int(self.key_ends[sample])].tobytes().decode()


def is_foreign(folder: Path) -> bool:
    """Whether a folder has an ``_info.json`` that this project did not write.

    Raises:
        FractalError: if it is not a JSON object.
    """
    return (folder / INFO).is_file() and "format_version" not in Fields.read(folder / INFO)


def load_foreign(folder: Path) -> ForeignInfo:
    """Read and check ``_info.json`` as timm writes it.

    Raises:
        FractalError: if a field is missing or wrong, or a name could lead out of the folder.
    """
    fields = Fields.read(folder / INFO)
    splits = fields.inner("splits")
    return ForeignInfo(
        folder,
        {name: _read_split(folder, splits.inner(name), name) for name in fields.mapping("splits")},
        fields.count("num_classes") if "num_classes" in fields else None,
    )


def list_shards(
    shards: Iterable[tuple[Path, int]], showing: Callable[[int], AbstractContextManager[Callable[[int], object]]]
) -> tuple[Listing, ...]:
    """The listings of tars in order, from the cache or by scanning them in worker processes.

    Args:
        shards: paths, and how many samples each shall have.
        showing: opened with the number of tars that must be scanned, if any; called with 1 for each that is done.

    Raises:
        FractalError: if a tar is missing, is no plain tar, lacks a label or an image, or has not so many samples.
    """
    wanted = tuple(shards)
    known = {path: listing for path, _ in wanted if (listing := _read_cache(path))}
    if unknown := [path for path, _ in wanted if path not in known]:
        with showing(len(unknown)) as advance:
            for path, listing in _scan_all(unknown):
                known[path] = listing
                advance(1)
    for path, samples in wanted:
        if (found := len(known[path])) != samples:
            raise FractalError(f"{path}: holds {found} samples, but {INFO} says {samples}; fetch it again")
    return tuple(known[path] for path, _ in wanted)


def listings_digest(listings: Iterable[Listing]) -> str:
    """32 hexadecimal digits over keys, labels, places and sizes: what tells one foreign dataset from another."""
    state = xxhash.xxh3_128()
    for listing in listings:
        for array in astuple(listing):
            state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()


def scan_tar(path: Path) -> Listing:
    """Find the samples of a tar by its headers: ustar, GNU or pax; what is neither image nor ``cls`` is passed over.

    The members of a sample are neighbours and have one name up to its first dot.

    Raises:
        FractalError: if it is no plain tar, ends early, or a sample lacks image or label.
        OSError: if it cannot be read.
    """
    samples = [_sample(path, key, members) for key, members in _groups(path)]
    keys = [key.encode(errors="replace") for key, *_ in samples]
    table = np.array([numbers for _, *numbers in samples], np.int64).reshape(-1, 3)
    return Listing(
        starts=table[:, 0].copy(),
        sizes=table[:, 1].copy(),
        labels=table[:, 2].copy(),
        keys=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
    )


def _read_split(folder: Path, fields: Fields, name: str) -> tuple[tuple[Path, int], ...]:
    where = f"{folder / INFO}: {name}"
    names, lengths = fields.texts("filenames"), fields.counts("shard_lengths")
    if len(names) != len(lengths):
        raise FractalError(f"{where}: {len(names)} filenames, but {len(lengths)} shard_lengths; fetch it again")
    return tuple((_inside(folder, name, where), length) for name, length in zip(names, lengths, strict=True))


def _inside(folder: Path, name: str, where: str) -> Path:
    return folder.joinpath(*(check_plain(part, where) for part in name.split("/")))


def _scan_all(paths: list[Path]) -> Iterator[tuple[Path, Listing]]:
    """Listings as they come."""
    if len(paths) <= _ALONE:
        yield from map(_scan_and_keep, paths)
        return
    with worker_pool(available_cores()) as pool:
        for future in as_completed([pool.submit(_scan_and_keep, path) for path in paths]):
            yield future.result()


def _scan_and_keep(path: Path) -> tuple[Path, Listing]:
    listing = scan_tar(path)
    with suppress(OSError):  # without a cache it is scanned again the next time
        kept = _cache_path(path)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(kept) as file:
            np.savez(file, *astuple(listing))
    return path, listing


def _read_cache(path: Path) -> Listing | None:
    """What was found in a tar of the same path, size and time of change."""
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        with np.load(_cache_path(path), allow_pickle=False) as arrays:
            listing = Listing(*(arrays[f"arr_{number}"] for number in range(5)))
        if _is_sound(listing):
            return listing
    return None


def _is_sound(listing: Listing) -> bool:
    columns = (listing.starts, listing.sizes, listing.labels, listing.key_ends)
    return (
        all(column.dtype == np.int64 and column.shape == listing.starts.shape for column in columns)
        and listing.keys.dtype == np.uint8
        and len(listing.keys) == (listing.key_ends[-1] if len(listing) else 0)
    )


def _cache_path(path: Path) -> Path:
    """Below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    status = path.stat()
    identity = f"{_VERSION}\0{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    return root / "fractalpretrain" / "listings" / f"{xxhash.xxh3_128_hexdigest(identity.encode())}.npz"


def _groups(path: Path) -> Iterator[tuple[str, dict[str, bytes | tuple[int, int]]]]:
    """The samples of a tar: key, and by extension where an image lies, or the bytes of a label."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        last, members = "", dict[str, bytes | tuple[int, int]]()
        for member in _regular_files(path, file.fileno()):
            folder, slash, name = member.name.removeprefix("./").rpartition("/")
            stem, _, extension = name.partition(".")
            key, extension = f"{folder}{slash}{stem}", extension.lower()
            if key != last:
                if members:
                    yield last, members
                last, members = key, {}
            if not stem or extension not in (*_IMAGES, _LABEL):
                continue
            if extension in members:
                raise FractalError(f"{path}: {key}.{extension} stands twice in one sample; fetch the file again")
            if member.offset_data + member.size > size:
                raise FractalError(f"{path}: {member.name} is cut off; fetch the file again")
            if extension == _LABEL:
                members[_LABEL] = os.pread(file.fileno(), min(member.size, _MAX_LABEL_BYTES + 1), member.offset_data)
            else:
                members[extension] = (member.offset_data, member.size)
        if members:
            yield last, members


def _regular_files(path: Path, descriptor: int) -> Iterator[tarfile.TarInfo]:
    try:
        with os.fdopen(os.dup(descriptor), "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    yield member
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise FractalError(f"{path}: not a plain tar ({error}); fetch it again, or decompress it") from error


def _sample(path: Path, key: str, members: Mapping[str, bytes | tuple[int, int]]) -> tuple[str, int, int, int]:
    """Key, start and size of the image, label."""
    places = [place for extension in _IMAGES if isinstance(place := members.get(extension), tuple)]
    label = members.get(_LABEL)
    if not places or not isinstance(label, bytes):
        missing = f".{_LABEL} file" if places else "image"
        raise FractalError(f"{path}: {key} has no {missing}; only images that have one .{_LABEL} each can be read")
    text = label.strip()
    if not (text.isdigit() and len(text) <= _MAX_DIGITS):
        raise FractalError(f"{path}: {key}: label {label[:_MAX_LABEL_BYTES]!r} is not a class index")
    start, size = places[0]
    return key, start, size, int(text)
