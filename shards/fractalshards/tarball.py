"""Samples as tar members: POSIX ustar, mtime 0, uid and gid 0, the members of one sample adjacent."""

import os
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fractalshards.errors import FractalError

BLOCK = 512
END_OF_TAR = bytes(2 * BLOCK)

# of a regular file; its fields are name 0, mode 100, uid 108, gid 116, size 124, mtime 136, sum 148, type 156
_NAME = tarfile.LENGTH_NAME
_SIZE = slice(124, 135)
_EMPTY_HEADER = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
_MODE_TO_GID = _EMPTY_HEADER[100:124]
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


def parse_sample(data: bytes) -> Sample:
    """Read the members of one sample back from its tar blocks.

    Raises:
        FractalError: if a header is damaged, a member is not a regular file or is cut off, or the members do not
            share one key.
    """
    files: dict[str, bytes] = {}
    keys: set[str] = set()
    at = 0
    while at < len(data):
        name, size = _parse_header(data[at : at + BLOCK])
        start, end = at + BLOCK, at + BLOCK + size
        if end > len(data):
            raise FractalError(f"{name}: cut off, {size} bytes promised")
        key, _, extension = name.partition(".")
        keys.add(key)
        if extension in files:
            raise FractalError(f"{name}: stands twice in one sample")
        files[extension] = data[start:end]
        at = start + padded(size)
    if len(keys) != 1:
        raise FractalError(f"expected the members of one sample, found {sorted(keys) or 'nothing'}")
    return Sample(keys.pop(), files)


def first_member_end(block: bytes) -> int:
    """Where the first member of a sample ends, and the second begins, from the sample's first block.

    Raises:
        FractalError: if the block is not the header of a regular file.
    """
    return BLOCK + padded(_parse_header(block)[1])


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
            raise FractalError(f"{name}: cut off, {size} bytes promised")
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
    if len(name) > _NAME or size >= 8**11:
        raise ValueError(f"{name!r} of {size} bytes does not fit into a tar header")
    digits = b"%011o" % size
    total = _HEADER_SUM + sum(name) + sum(digits)
    return b"".join((name.ljust(_NAME, b"\0"), _MODE_TO_GID, digits, _MTIME, b"%06o" % total, _REST))


def _parse_header(block: bytes) -> tuple[str, int]:
    """Name and size of the regular file whose header ``block`` is; headers of our own are told by their bytes."""
    name, digits = block[:_NAME].rstrip(b"\0"), block[_SIZE]
    if len(block) == BLOCK and name.isascii() and not digits.strip(b"01234567"):
        size = int(digits, 8)
        if _pack_header(name, size) == block:
            return name.decode("ascii"), size
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise FractalError(f"damaged tar header: {error}") from error
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.size < 0:
        raise FractalError(f"{member.name}: not a regular file")
    return member.name, member.size
