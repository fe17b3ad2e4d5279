"""The samples of tars that other programs wrote, found by reading the headers of all members.

The result is not cached: nothing less than reading them again could tell whether a tar has changed.
"""

import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import FileIO
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from fractalshards.errors import FractalError
from fractalshards.human import human_count, human_list
from fractalshards.manifest import MAX_SAMPLE_BYTES
from fractalshards.storage import regular_size
from fractalshards.workers import available_cores, worker_pool

_log = logging.getLogger(__name__)

_IMAGES = ("jpg", "jpeg", "png", "webp")  # if a sample has several, the first of these is its image
_IGNORED = re.compile(r"(^|/)(\.[^/.][^/]*|__MACOSX|@eaDir)(/|$)|^__[^/]*__/")  # hidden files, metadata of webdataset
_MAX_DIGITS = 9  # of a class index
_MAX_CLS_BYTES, _MAX_JSON_BYTES = 20, 1 << 20
_MAX_HEADER_BYTES = 1 << 20  # with the long names and other fields of GNU and pax headers
_FEW_TARS = 4  # read in less time than worker processes take to start
_MAX_NAMED = 8  # fields that an error lists
_ADVICE = "add it, make the tar with --sort=name"

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tar:
    """A tar to read."""

    path: Path
    samples: int | None = None  # how many it must have; None: unknown
    label_key: str | None = None  # field of ``KEY.json`` that holds the class index; None: it is in ``KEY.cls``


@dataclass(frozen=True)
class TarIndex:
    """The usable samples of a tar, as arrays with an entry per sample except for ``keys``."""

    starts: Positions  # first byte of the image
    sizes: Positions  # of the image in bytes
    labels: Positions  # class indices
    keys: npt.NDArray[np.uint8]  # the concatenated keys in UTF-8
    key_ends: Positions  # end of each key in ``keys``
    bad: int = 0  # number of samples that are left out
    first_bad: str = ""  # what is wrong with the first of these

    def __len__(self) -> int:
        return len(self.starts)

    def key(self, sample: int) -> str:
        """Return the common name of a sample's members, folders included."""
        start = int(self.key_ends[sample - 1]) if sample else 0
        return self.keys[start : int(self.key_ends[sample])].tobytes().decode()


def index_tars(tars: Sequence[Tar], skip_bad: bool = False) -> tuple[TarIndex, ...]:
    """Find the samples of tars by their headers, in order; several tars are read in worker processes.

    Raises FractalError as ``index_tar`` does, or if a tar has another number of samples than it must have.
    """
    if tars:
        _log.info("reading the headers of %s in %s", human_count(len(tars), "tar"), tars[0].path.parent)
    index_one = partial(index_tar, skip_bad=skip_bad)
    if len(tars) <= _FEW_TARS:
        indices = tuple(map(index_one, tars))
    else:
        with worker_pool(available_cores()) as pool:
            indices = tuple(pool.map(index_one, tars))
    if bad := sum(index.bad for index in indices):
        first = next(index.first_bad for index in indices if index.bad)
        _log.warning("%s left out, the first: %s", human_count(bad, "bad sample"), first)
    for tar, index in zip(tars, indices, strict=True):
        count = len(index) + index.bad
        if tar.samples not in (None, count):
            raise FractalError(f"{tar.path}: {count} samples, not {tar.samples}; fetch it again, or drop the info file")
    return indices


def index_tar(tar: Tar, skip_bad: bool = False) -> TarIndex:
    """Find the samples of a tar by its headers (ustar, GNU or pax).

    The members of a sample are neighbours and share their name up to the first dot of the base name. A hard link
    stands for the member that it names. Hidden files, ``__MACOSX`` and files other than image and label are ignored.

    Raises FractalError if it is not a plain tar or ends early; unless ``skip_bad``, also if a sample is not usable.
    """
    keys: list[bytes] = []
    places: list[tuple[int, int, int]] = []  # start and size of an image, and its label
    bad, first_bad = 0, ""
    size = regular_size(tar.path)
    with tar.path.open("rb") as file:
        for key, members in groupby(_members(tar.path, file.fileno()), attrgetter("key")):
            try:
                if place := _find_sample(members, tar.label_key, file.fileno(), size):
                    keys.append(key.encode(errors="replace"))
                    places.append(place)
            except _BadSampleError as error:
                fault = f"{tar.path}: {key} {error}"
                if not skip_bad:
                    raise FractalError(f"{fault}, or train with --on-bad-sample skip") from error
                bad, first_bad = bad + 1, first_bad or fault
    starts, sizes, labels = np.array(places, np.int64).reshape(-1, 3).T.copy()
    key_ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
    return TarIndex(starts, sizes, labels, np.frombuffer(b"".join(keys), np.uint8), key_ends, bad, first_bad)


def index_digest(indices: Iterable[TarIndex]) -> str:
    """Return 32 hexadecimal digits over keys, labels, positions and sizes, which identify the dataset."""
    state = xxhash.xxh3_128()
    for index in indices:
        for array in (index.starts, index.sizes, index.labels, index.keys, index.key_ends):
            state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()


class _BadSampleError(Exception):
    """A sample cannot be used; the message continues its name to a sentence."""


class _Member(NamedTuple):
    """A file of a sample: ``key.extension``, the extension in lower case, and its place in the tar."""

    key: str
    extension: str
    start: int
    size: int


def _find_sample(
    members: Iterable[_Member], label_key: str | None, descriptor: int, tar_size: int
) -> tuple[int, int, int] | None:
    """Return where the image of a sample is, and its label; None if the members are not those of a sample."""
    label_extension = "cls" if label_key is None else "json"
    found: dict[str, _Member] = {}
    dotted = ""
    for member in members:
        if member.extension.rpartition(".")[2] in _IMAGES:
            dotted = dotted or member.extension
        if member.extension in (*_IMAGES, label_extension):
            if member.extension in found:
                raise _BadSampleError(f"has two files .{member.extension}; remove one")
            if member.start + member.size > tar_size:
                raise _BadSampleError("is cut off; fetch the tar again")
            found[member.extension] = member
    image = next((found[extension] for extension in _IMAGES if extension in found), None)
    label = found.get(label_extension)
    if image is None:
        if dotted:
            raise _BadSampleError(f"has no image, only .{dotted}: a key ends at its first dot; rename the files")
        if label is None or label_key is not None:
            return None
        raise _BadSampleError(f"has a label but no image (.{', .'.join(_IMAGES)}) next to it; {_ADVICE}")
    if label is None:
        other = ", name a field of .json with --label-key" if label_key is None else ""
        raise _BadSampleError(f"has no .{label_extension} next to its image; {_ADVICE}{other}")
    if image.size > MAX_SAMPLE_BYTES:
        raise _BadSampleError(f"has an image larger than {MAX_SAMPLE_BYTES >> 20} MiB; remove it")
    return image.start, image.size, _read_label(label, label_key, descriptor)


def _read_label(member: _Member, label_key: str | None, descriptor: int) -> int:
    most = _MAX_CLS_BYTES if label_key is None else _MAX_JSON_BYTES
    text = os.pread(descriptor, min(member.size, most + 1), member.start)
    if label_key is not None:
        try:
            fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise _BadSampleError(f"has a .json that is no object of at most {most >> 20} MiB; correct it") from error
        if label_key not in fields:
            found = human_list([*fields], _MAX_NAMED)
            raise _BadSampleError(f"has no {label_key!r} in its .json, only {found}; name one with --label-key")
        text = bytes(fields[label_key])
    digits = text.strip().strip(b'"').removesuffix(b".0").strip()  # pandas writes integers of some columns as floats
    if not (digits.isdigit() and len(digits) <= _MAX_DIGITS):
        raise _BadSampleError(f"has the label {text[:_MAX_CLS_BYTES]!r}, not a class index; correct it")
    return int(digits)


def _members(path: Path, descriptor: int) -> Iterator[_Member]:
    """Yield the files of a tar that belong to samples, hard links with the place of the member that they name."""
    places: dict[str, tuple[int, int]] = {}
    for header in _headers(path, descriptor):
        name, target = header.name.removeprefix("./"), header.linkname.removeprefix("./")
        if header.isreg() and not header.issparse():
            places[name] = header.offset_data, header.size
        elif header.islnk() and target in places:
            places[name] = places[target]
        else:
            continue
        folder, slash, file = name.rpartition("/")
        stem, _, extension = file.partition(".")
        if stem and extension and not _IGNORED.search(name):
            yield _Member(f"{folder}{slash}{stem}", extension.lower(), *places[name])


def _headers(path: Path, descriptor: int) -> Iterator[tarfile.TarInfo]:
    try:
        with _HeaderFile(os.dup(descriptor)) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while header := tar.next():
                tar.members = []  # type: ignore[attr-defined]  # would keep all headers in memory
                if header.size < 0:  # some versions of Python would read such a tar forever
                    raise FractalError(f"{path}: {header.name} has a negative size; do not use this dataset")
                yield header
            if os.pread(descriptor, tarfile.BLOCKSIZE, tar.offset).strip(b"\0"):  # tarfile takes it for the end
                raise tarfile.ReadError(f"a damaged header at byte {tar.offset:,}")
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise FractalError(f"{path}: not a plain tar ({error}); fetch it again, or decompress it") from error


class _HeaderFile(FileIO):
    """A tar of which only headers are read, bounded: ``tarfile`` would read names of any size into memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)
