"""The image of a sample and its file in the tar: ``KEY.png``, ``KEY.jpg`` or ``KEY.webp``, told by what is in it."""

import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from fractalshards.errors import FractalError
from fractalshards.fields import Fields

PNG = "png"


def image_format(data: bytes) -> str | None:
    """The extension that an encoded image has in a shard, by its first bytes; None if shards hold no such images."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "webp"
    return None


def image_extension(files: Mapping[str, bytes]) -> str:
    """Which of a sample's files, by extension, is its image: the one beside the label.

    Raises:
        FractalError: if there is not one image and one label.
    """
    label = label_extension(files)
    images = [extension for extension in files if extension != label]
    if len(images) != 1:
        raise FractalError(f"expected one image, found {images or 'none'}")
    return images[0]


LabelType = Literal["single", "multi"]

_SINGLE = "cls"
_MULTI = "json"
_MAX_DIGITS = 9
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Object:
    """One object of an image: its class index, and the box [x, y, width, height] of what is visible, in pixels."""

    label: int
    bbox: tuple[int, int, int, int]


@dataclass(frozen=True)
class MultiLabel:
    """What is visible in an image: its classes, sorted and unique, and its objects in paint order, one or more."""

    labels: tuple[int, ...]
    objects: tuple[Object, ...]

    @classmethod
    def of(cls, objects: tuple[Object, ...]) -> "MultiLabel":
        """The label of an image with these objects."""
        return cls(tuple(sorted({thing.label for thing in objects})), objects)


Label = int | MultiLabel


def classes_of(label: Label) -> tuple[int, ...]:
    """The class indices of a label."""
    return (label,) if isinstance(label, int) else label.labels


def encode_label(label: Label) -> tuple[str, bytes]:
    """The extension and the bytes of the label's file.

    ``cls``: the class index in ASCII digits. ``json``: ``labels`` and ``objects`` with ``class`` and ``bbox``.
    """
    if isinstance(label, int):
        return _SINGLE, b"%d" % label
    objects = [{"class": thing.label, "bbox": thing.bbox} for thing in label.objects]
    return _MULTI, json.dumps({"labels": label.labels, "objects": objects}, separators=(",", ":")).encode()


def label_extension(files: Mapping[str, bytes]) -> str:
    """Which of a sample's files, by extension, is its label.

    Raises:
        FractalError: if there is not exactly one.
    """
    found = [extension for extension in (_SINGLE, _MULTI) if extension in files]
    if len(found) != 1:
        raise FractalError(f"expected one label, .{_SINGLE} or .{_MULTI}, in {sorted(files)}")
    return found[0]


def decode_label(files: Mapping[str, bytes]) -> Label:
    """The label of a sample from its files by extension.

    Raises:
        FractalError: if there is not one label file, it is not an ASCII integer of at most nine digits, or its JSON
            is not that of ``encode_label``: class indices sorted and unique, those of the objects.
    """
    extension = label_extension(files)
    text = files[extension]
    if extension == _MULTI:
        return _decode_objects(text)
    if not (text.isdigit() and len(text) <= _MAX_DIGITS):
        raise FractalError(f"label {text[:20]!r} is not a class index")
    return int(text)


def _decode_objects(text: bytes) -> MultiLabel:
    if len(text) > _MAX_BYTES:
        raise FractalError(f"label of {len(text):,} bytes is too long")
    fields = Fields.parse(text, "label")
    label = MultiLabel.of(tuple(Object(thing.count("class"), _box(thing)) for thing in fields.inners("objects")))
    if not label.objects:
        raise FractalError("no object in the label")
    if fields.counts("labels") != label.labels:
        raise FractalError("labels are not the classes of the objects, sorted and unique")
    return label


def _box(thing: Fields) -> tuple[int, int, int, int]:
    box = thing.counts("bbox")
    if len(box) != 4 or 0 in box[2:]:
        raise FractalError(f"bbox {box} is not [x, y, width, height]")
    return box[0], box[1], box[2], box[3]


BLOCK = 512
END_OF_TAR = bytes(2 * BLOCK)
_LONGEST_KEY = 32  # that is shown

# of a regular file; its fields are name 0, mode 100, uid 108, gid 116, size 124, mtime 136, sum 148, type 156
_EMPTY_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_MODE_TO_GID = _EMPTY_HEADER[100:124]
_SIZE = slice(124, 135)
_MTIME = _EMPTY_HEADER[135:148]
_REST = _EMPTY_HEADER[154:]
_HEADER_SUM = sum(_EMPTY_HEADER[:124]) + sum(_EMPTY_HEADER[135:148]) + 8 * ord(" ") + sum(_EMPTY_HEADER[156:])


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its data are ``size`` bytes from byte ``start`` of the file that holds the tar."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Sample:
    """One sample as stored: its key and its files by extension, e.g. ``{"png": ..., "cls": ...}``."""

    key: str
    files: Mapping[str, bytes]


def pack_sample(sample: Sample) -> bytes:
    """The tar blocks of one sample: a header and padded data per file, in the order of ``files``."""
    return b"".join(_pack_member(f"{sample.key}.{ext}", data) for ext, data in sample.files.items())


def packed_size(sample: Sample) -> int:
    """Bytes of what ``pack_sample`` makes of a sample."""
    return sum(BLOCK + padded(len(data)) for data in sample.files.values())


def parse_sample(data: bytes) -> Sample:
    """Read the members of one sample back from its tar blocks.

    Raises:
        FractalError: as ``sample_members`` does.
    """
    members = sample_members(lambda at: data[at : at + BLOCK], 0, len(data))
    files = {extension_of(member.name): data[member.start : member.start + member.size] for member in members}
    return Sample(members[0].name.partition(".")[0], files)


def sample_members(read_block: Callable[[int], bytes], start: int, end: int) -> tuple[Member, ...]:
    """The members of the one sample in the bytes ``start:end`` of a tar, of which only the headers are read.

    Args:
        read_block: gives the 512 bytes at a position.

    Raises:
        FractalError: if a header is damaged, a member is not a regular file or is cut off, or the members do not
            share one key.
    """
    members = tuple(_walk(read_block, start, end))
    if len(keys := {member.name.partition(".")[0] for member in members}) != 1:
        raise FractalError(f"expected the members of one sample, found {sorted(keys) or 'nothing'}")
    if len({member.name for member in members}) != len(members):
        raise FractalError(f"{keys.pop()}: a file stands twice in one sample")
    return members


def extension_of(name: str) -> str:
    """What a member is in its sample: its name after the key, ``png`` of ``000000007.png``."""
    return name.partition(".")[2]


def shown_key(blocks: bytes) -> str:
    """The key in the first header of a sample that may be damaged, to name it: ASCII, short, perhaps empty."""
    name = blocks[: tarfile.LENGTH_NAME].partition(b"\0")[0].decode("latin-1")
    key = ascii(name.partition(".")[0])[1:-1]
    return key if len(key) <= _LONGEST_KEY else f"{key[:_LONGEST_KEY]}..."


def _walk(read_block: Callable[[int], bytes], start: int, end: int) -> Iterator[Member]:
    at = start
    while at < end:
        name, size = _parse_header(read_block(at))
        at += BLOCK
        if at + size > end:
            raise FractalError(f"{name}: cut off, {size:,} bytes promised")
        yield Member(name, at, size)
        at += padded(size)


def first_member_end(block: bytes) -> int:
    """Where the first member of a sample ends, and the second begins, from the sample's first block.

    Raises:
        FractalError: if the block is not the header of a regular file.
    """
    _, size = _parse_header(block)
    return BLOCK + padded(size)


def scan_members(descriptor: int, start: int, stop: int) -> Iterator[Member]:
    """All members of the tar that lies in ``[start, stop)`` of an open file, from their headers alone.

    Raises:
        FractalError: if a header is damaged, or a member is not a regular file or reaches beyond ``stop``.
    """
    at = start
    while at < stop:
        header = os.pread(descriptor, min(BLOCK, stop - at), at)
        if not header.strip(b"\0"):
            return
        name, size = _parse_header(header)
        if at + BLOCK + size > stop:
            raise FractalError(f"{name}: cut off, {size:,} bytes promised")
        yield Member(name, at + BLOCK, size)
        at += BLOCK + padded(size)


def padded(size: int) -> int:
    """``size`` rounded up to whole tar blocks."""
    return -(-size // BLOCK) * BLOCK


def _pack_member(name: str, data: bytes) -> bytes:
    padding = bytes(padded(len(data)) - len(data))
    return _pack_header(name.encode("ascii"), len(data)) + data + padding


def _pack_header(name: bytes, size: int) -> bytes:
    """What ``tarfile.TarInfo.tobuf`` makes of a regular file, at a fifth of its time: there are two for every image.

    Only name, size and sum differ between members, and the sum counts its own field as eight spaces.
    """
    if len(name) > tarfile.LENGTH_NAME or size >= 8**11:
        raise ValueError(f"{name!r} of {size} bytes does not fit into a tar header")
    digits = b"%011o" % size
    total = _HEADER_SUM + sum(name) + sum(digits)
    return b"".join((name.ljust(tarfile.LENGTH_NAME, b"\0"), _MODE_TO_GID, digits, _MTIME, b"%06o" % total, _REST))


def _parse_header(block: bytes) -> tuple[str, int]:
    """Name and size of a regular file. ``tarfile`` reads headers that are not as ours, at ten times the time."""
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
