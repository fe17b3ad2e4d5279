"""One sample: its image and label as files, and those files as members of a tar."""

import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from fractalshards.errors import FractalError
from fractalshards.storage import parse_json

PNG = "png"


def image_format(data: bytes) -> str | None:
    """Return the extension for an image, found by its first bytes; None for formats that shards do not store."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    return None


LabelType = Literal["single", "multi"]

_SINGLE = "cls"
_MULTI = "json"
_MAX_DIGITS = 9
_MAX_BYTES = 1 << 20
_Index = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Side = Annotated[int, msgspec.Meta(ge=1, le=2**63 - 1)]


class Object(msgspec.Struct, frozen=True):
    """One object of an image: its class index, and the box [x, y, width, height] of its visible part, in pixels."""

    label: _Index = msgspec.field(name="class")
    bbox: tuple[_Index, _Index, _Side, _Side]


class MultiLabel(msgspec.Struct, frozen=True):
    """Label of a multi-label image: its visible classes, sorted and unique, and its objects in paint order."""

    labels: tuple[_Index, ...]
    objects: Annotated[tuple[Object, ...], msgspec.Meta(min_length=1)]

    @classmethod
    def of(cls, objects: tuple[Object, ...]) -> "MultiLabel":
        """Return the label of an image with these objects."""
        return cls(tuple(sorted({thing.label for thing in objects})), objects)


Label = int | MultiLabel


def classes_of(label: Label) -> tuple[int, ...]:
    """Return the class indices of a label."""
    return (label,) if isinstance(label, int) else label.labels


def encode_label(label: Label) -> tuple[str, bytes]:
    """Return the extension and the content of a label's file.

    ``cls``: the class index in ASCII digits. ``json``: ``labels``, and ``objects`` with ``class`` and ``bbox``.
    """
    return (_SINGLE, b"%d" % label) if isinstance(label, int) else (_MULTI, msgspec.json.encode(label))


def label_extension(files: Mapping[str, object]) -> str:
    """Return the extension of a sample's label; raise FractalError if there is not exactly one."""
    found = [extension for extension in (_SINGLE, _MULTI) if extension in files]
    if len(found) != 1:
        raise FractalError(f"expected one label, .{_SINGLE} or .{_MULTI}, in {sorted(files)}")
    return found[0]


def image_extension(files: Mapping[str, bytes]) -> str:
    """Return the extension of a sample's image; raise FractalError if there is not one image and one label."""
    label = label_extension(files)
    images = [extension for extension in files if extension != label]
    if len(images) != 1:
        raise FractalError(f"expected one image, found {images or 'none'}")
    return images[0]


def decode_label(files: Mapping[str, bytes]) -> Label:
    """Decode the label of a sample, given its files by extension.

    Raises FractalError if there is not exactly one label; if ``cls`` is not an ASCII integer of at most nine digits; if
    ``json`` does not have the fields of ``encode_label``, or its labels are not the classes of its objects.
    """
    extension = label_extension(files)
    text = files[extension]
    if extension == _SINGLE:
        if not (text.isdigit() and len(text) <= _MAX_DIGITS):
            raise FractalError(f"label {text[:20]!r} is not a class index")
        return int(text)
    if len(text) > _MAX_BYTES:
        raise FractalError(f"label of {len(text):,} bytes is too long")
    label = parse_json(text, MultiLabel, "label")
    if label != MultiLabel.of(label.objects):
        raise FractalError("labels are not the classes of the objects, sorted and unique")
    return label


BLOCK = 512
END_OF_TAR = bytes(2 * BLOCK)
_LONGEST_KEY = 32  # in messages

# Header of a regular file; its fields are name 0, mode 100, uid 108, gid 116, size 124, mtime 136, sum 148, type 156
_EMPTY_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_MODE_TO_GID = _EMPTY_HEADER[100:124]
_SIZE = slice(124, 135)
_MTIME = _EMPTY_HEADER[135:148]
_REST = _EMPTY_HEADER[154:]
_HEADER_SUM = sum(_EMPTY_HEADER[:124]) + sum(_EMPTY_HEADER[135:148]) + 8 * ord(" ") + sum(_EMPTY_HEADER[156:])


@dataclass(frozen=True)
class Member:
    """A regular file in a tar, whose data are the ``size`` bytes from byte ``start``."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Sample:
    """One sample as stored: its key and its files by extension, e.g. ``{"png": ..., "cls": ...}``."""

    key: str
    files: Mapping[str, bytes]


def pack_sample(sample: Sample) -> bytes:
    """Return the tar blocks of a sample: a header and padded data per file, in the order of ``files``."""
    parts: list[bytes] = []
    for extension, data in sample.files.items():
        parts += [_pack_header(f"{sample.key}.{extension}".encode("ascii"), len(data)), data, bytes(-len(data) % BLOCK)]
    return b"".join(parts)


def packed_size(sample: Sample) -> int:
    """Return the number of bytes that ``pack_sample`` makes of a sample."""
    return sum(BLOCK + padded(len(data)) for data in sample.files.values())


def parse_sample(data: bytes) -> Sample:
    """Parse the tar blocks of one sample, whose members must be whole, regular files with the same key."""
    members = tuple(_walk(lambda at: data[at : at + BLOCK], 0, len(data)))
    if len(keys := {member.name.partition(".")[0] for member in members}) != 1:
        raise FractalError(f"expected the members of one sample, found {sorted(keys) or 'nothing'}")
    key = keys.pop()
    if len({member.name for member in members}) != len(members):
        raise FractalError(f"{key}: a file occurs twice in one sample")
    return Sample(key, {m.name.partition(".")[2]: data[m.start : m.start + m.size] for m in members})


def shown_key(blocks: bytes) -> str:
    """Return the key in the first header of a sample that may be damaged: ASCII, short, perhaps empty."""
    name = blocks[: tarfile.LENGTH_NAME].partition(b"\0")[0].decode("latin-1")
    key = ascii(name.partition(".")[0])[1:-1]
    return key if len(key) <= _LONGEST_KEY else f"{key[:_LONGEST_KEY]}..."


def scan_members(descriptor: int, start: int, stop: int) -> Iterator[Member]:
    """Yield the members of the tar in ``[start, stop)`` of an open file, reading headers only; see ``parse_sample``."""

    def read_block(at: int) -> bytes:
        header = os.pread(descriptor, min(BLOCK, stop - at), at)
        return header if header.strip(b"\0") else b""

    return _walk(read_block, start, stop)


def _walk(read_block: Callable[[int], bytes], start: int, stop: int) -> Iterator[Member]:
    """Yield the members of a tar in ``[start, stop)``, up to an empty block."""
    at = start
    while at < stop and (header := read_block(at)):
        name, size = _parse_header(header)
        at += BLOCK
        if at + size > stop:
            raise FractalError(f"{name}: cut off before its {size:,} bytes end")
        yield Member(name, at, size)
        at += padded(size)


def padded(size: int) -> int:
    """Round ``size`` up to whole tar blocks."""
    return -(-size // BLOCK) * BLOCK


def _pack_header(name: bytes, size: int) -> bytes:
    """Return the same header as ``tarfile.TarInfo.tobuf``, in a fifth of the time: every image needs two.

    Only name, size and checksum differ between members; the checksum counts its own field as eight spaces.
    """
    if len(name) > tarfile.LENGTH_NAME or size >= 8**11:
        raise ValueError(f"{name!r} of {size} bytes does not fit into a tar header")
    digits = b"%011o" % size
    total = _HEADER_SUM + sum(name) + sum(digits)
    return b"".join((name.ljust(tarfile.LENGTH_NAME, b"\0"), _MODE_TO_GID, digits, _MTIME, b"%06o" % total, _REST))


def _parse_header(block: bytes) -> tuple[str, int]:
    """Return name and size of a regular file; headers that differ from ours take ten times as long, by ``tarfile``."""
    name = block[: tarfile.LENGTH_NAME].split(b"\0", 1)[0]
    with suppress(ValueError):
        size = int(block[_SIZE], 8)
        if size >= 0 and _pack_header(name, size) == block:
            return name.decode("ascii"), size
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise FractalError(f"damaged tar header: {error}") from error
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.size < 0:
        raise FractalError(f"{member.name}: not a regular file")
    return member.name, member.size
