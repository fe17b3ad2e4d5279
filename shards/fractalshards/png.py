"""Images: PNG encoding, a fast decoder for the two layouts that this project writes, Pillow for all others."""

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from isal import igzip_lib, isal_zlib
from PIL import Image, UnidentifiedImageError

from fractalshards.errors import FractalError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_NONE, _UP = 0, 2  # filters of a row
_RGB, _PALETTE = 2, 3  # colour types
_HEADER = struct.Struct(">II5B")  # width, height, bit depth, colour type, compression, filter, interlace
_LEVEL = 2  # of ISA-L, 0 to 3; at 1, a process now and then compresses the same data to other bytes
_MAX_PIXELS = 64_000_000
_MAX_CHUNKS = 100_000  # an empty chunk takes thirty times its bytes in memory
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_WHITE_IS_ZERO = 0
_UNBOUNDED = {"I": "signed or 32-bit integers", "F": "floats"}  # modes of Pillow
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")  # not EPS, which starts Ghostscript

Pixels = npt.NDArray[np.uint8]

GREYS: Pixels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(256, 3)
"""The palette of a grey image: a PNG with it is read back in three channels, unlike a grey one."""

_GREY_BYTES = GREYS.tobytes()


@lru_cache(maxsize=16)
def _octets(palette: bytes) -> npt.NDArray[np.uint64]:
    """Return the eight pixels of two colours that the bits of each byte select, 24 bytes each: (256, 3) uint64."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    return np.frombuffer(palette, np.uint8).reshape(2, 3)[bits].reshape(256, 24).view(np.uint64)


@dataclass(frozen=True)
class Indexed:
    """An image of few colours: ``indices`` (H, W) uint8 into ``palette`` (k, 3) uint8, k in 1..256."""

    indices: Pixels
    palette: Pixels

    def rgb(self) -> Pixels:
        """Return the image as (H, W, 3) uint8."""
        height, width = self.indices.shape
        if len(self.palette) == 2:  # eight pixels per look-up, several times as fast as one
            octets = _octets(self.palette.tobytes())
            pixels = octets.take(np.packbits(self.indices), axis=0, mode="clip").view(np.uint8)
            return pixels.reshape(-1, 3)[: height * width].reshape(height, width, 3)
        if self.palette.tobytes() == _GREY_BYTES:
            return _grey_rgb(self.indices)
        picture = Image.frombytes("P", (width, height), self.indices.tobytes())
        picture.putpalette(self.palette.tobytes())
        return np.asarray(picture.convert("RGB"))


def _grey_rgb(levels: Pixels) -> Pixels:
    """Repeat grey levels (H, W) in three channels: four at once, in words of four bytes."""
    flat = np.ascontiguousarray(levels).reshape(-1)
    words = (np.pad(flat, (0, -len(flat) % 4)) if len(flat) % 4 else flat).view("<u4")
    a, b, c, d = words & 255, words >> 8 & 255, words >> 16 & 255, words >> 24
    tripled = np.empty((len(words), 3), "<u4")
    np.bitwise_or(a * np.uint32(0x010101), b << 24, out=tripled[:, 0])
    np.bitwise_or(b * np.uint32(0x0101), c * np.uint32(0x01010000), out=tripled[:, 1])
    np.bitwise_or(c, d * np.uint32(0x01010100), out=tripled[:, 2])
    return tripled.view(np.uint8).reshape(-1)[: 3 * len(flat)].reshape(*levels.shape, 3)


def pixels_of(image: Pixels | Indexed) -> Pixels:
    """Return the pixels of an image, (H, W, 3) uint8."""
    return image.rgb() if isinstance(image, Indexed) else image


def isal_compress(rows: Pixels) -> bytes:
    """Compress an array to a zlib stream; the bytes depend on the CPU."""
    return isal_zlib.compress(rows, _LEVEL)


def encode_png(image: Pixels | Indexed, compress: Callable[[Pixels], bytes] = isal_compress) -> bytes:
    """Encode an image as PNG, without loss.

    (H, W, 3) uint8 becomes 8-bit RGB, all rows filtered with Up. An indexed image becomes a palette image without
    filter, with 1 bit per pixel for up to two colours, else 8. ``compress`` turns filtered rows, (H, 1 + bytes of a
    row) uint8, into a zlib stream.
    """
    if isinstance(image, Indexed):
        height, width = image.indices.shape
        depth, color, palette = 1 if len(image.palette) <= 2 else 8, _PALETTE, _chunk(b"PLTE", image.palette.tobytes())
        indices = np.ascontiguousarray(image.indices)  # packing a mirrored image takes four times as long
        body = np.packbits(indices, axis=1) if depth == 1 else indices
        rows = np.empty((height, 1 + body.shape[1]), np.uint8)
        rows[:, 0] = _NONE
        rows[:, 1:] = body
    else:
        height, width, _ = image.shape
        depth, color, palette = 8, _RGB, b""
        flat = image.reshape(height, width * 3)
        rows = np.empty((height, 1 + width * 3), np.uint8)
        rows[:, 0] = _UP
        rows[0, 1:] = flat[0]
        np.subtract(flat[1:], flat[:-1], out=rows[1:, 1:])
    header = _chunk(b"IHDR", _HEADER.pack(width, height, depth, color, 0, 0, 0))
    return b"".join((_SIGNATURE, header, palette, _chunk(b"IDAT", compress(rows)), _chunk(b"IEND", b"")))


def decode_image(data: bytes) -> Pixels:
    """Decode an image to RGB, (H, W, 3) uint8: PNGs of ``encode_png`` fast, other images by Pillow.

    Raises FractalError if it is damaged, truncated, not an image, or claims more than 64 million pixels.
    """
    if not data.startswith(_SIGNATURE):
        return _decode_any(data)
    pixels = _decode_own(_png_chunks(data))
    return _decode_any(data) if pixels is None else pixels


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", isal_zlib.crc32(data, zlib.crc32(kind)))


def _png_chunks(data: bytes) -> list[tuple[bytes, memoryview]]:
    """Split a PNG into kind and body of its chunks, checking their sums, which Pillow does not do for image data."""
    chunks: list[tuple[bytes, memoryview]] = []
    view = memoryview(data)
    at = len(_SIGNATURE)
    while at < len(data):
        length = int.from_bytes(view[at : at + 4])
        kind, body, check = bytes(view[at + 4 : at + 8]), view[at + 8 : at + 8 + length], view[at + 8 + length :][:4]
        at += 12 + length
        needed = kind[:1].isupper() or at > len(data)
        if needed and int.from_bytes(check) != isal_zlib.crc32(body, zlib.crc32(kind)):
            raise FractalError(f"image cannot be decoded: chunk {kind!r} of the PNG is damaged")
        chunks.append((kind, body))
        if len(chunks) > _MAX_CHUNKS:
            raise FractalError(f"image cannot be decoded: more than {_MAX_CHUNKS:,} chunks in the PNG")
    return chunks


def _decode_own(chunks: list[tuple[bytes, memoryview]]) -> Pixels | None:
    """Decode exactly what ``encode_png`` writes: IHDR, PLTE for a palette, one IDAT, IEND; None for anything else."""
    bodies = dict(chunks)
    if [kind for kind, _ in chunks] not in ([b"IHDR", b"IDAT", b"IEND"], [b"IHDR", b"PLTE", b"IDAT", b"IEND"]):
        return None
    if len(bodies[b"IHDR"]) != _HEADER.size:
        return None
    width, height, depth, color, *rest = _HEADER.unpack(bodies[b"IHDR"])
    if any(rest) or not 0 < width * height <= _MAX_PIXELS:
        return None
    if (depth, color) == (8, _RGB):
        rows = _inflate_rows(bodies[b"IDAT"], height, width * 3, _UP)
        return None if rows is None else _sum_down(rows).reshape(height, width, 3)
    palette = bodies.get(b"PLTE", b"")
    if color != _PALETTE or depth not in (1, 8) or len(palette) % 3 or not 0 < len(palette) <= 3 * 256:
        return None
    rows = _inflate_rows(bodies[b"IDAT"], height, -(-width * depth // 8), _NONE)
    if rows is None:
        return None
    indices = np.unpackbits(rows, axis=1, count=width) if depth == 1 else rows
    colors = np.frombuffer(palette, np.uint8).reshape(-1, 3)
    return Indexed(indices, colors).rgb() if int(indices.max()) < len(colors) else None


def _inflate_rows(body: memoryview, height: int, width: int, row_filter: int) -> Pixels | None:
    """Inflate rows of ``width`` bytes, all with the given filter, to (height, width); None if they differ."""
    size = height * (1 + width)
    try:
        inflated = isal_zlib.decompressobj().decompress(body, size + 1)
    except igzip_lib.IsalError:  # type: ignore[misc]  # its stub declares the class as an instance
        return None
    if len(inflated) != size:
        return None
    rows = np.frombuffer(inflated, np.uint8).reshape(height, 1 + width)
    return rows[:, 1:] if (rows[:, 0] == row_filter).all() else None


def _sum_down(rows: Pixels) -> Pixels:
    """Return the cumulative sums of rows, modulo 256, as a new contiguous array.

    Adds up 2, 4, 8, ... rows at a time, because numpy's cumsum goes down one column after another, and alternates
    between two arrays, because in place numpy would first copy the rows that overlap.
    """
    sums, spare = rows.copy(), np.empty(rows.shape, np.uint8)
    known = 1
    while known < len(rows):
        np.add(sums[known:], sums[:-known], out=spare[known:])
        spare[:known] = sums[:known]
        sums, spare = spare, sums
        known *= 2
    return sums


def _decode_any(data: bytes) -> Pixels:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about odd but readable files; sizes are checked here
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise FractalError(f"image claims to have {image.width} x {image.height} pixels")
                rgb = _rgb(image)
            image.close()  # frees its pixels before there is a third copy of them
            return np.asarray(rgb)
    except (FractalError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        what = "damaged, or of a format or pixel type that cannot be read"
        raise FractalError(f"image cannot be decoded: {what}") from error
    except Exception as error:  # Pillow does not document what its decoders raise for damaged files
        raise FractalError(f"image cannot be decoded: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of Pillow to RGB: alpha is dropped, and 16-bit grey keeps its high byte, where Pillow clips."""
    is_16_bit = image.mode == "I" and image.format in ("PNG", "PPM")  # which hold no wider integers
    if image.mode.startswith("I;16") or is_16_bit:
        return Image.fromarray(_high_bytes(image)).convert("RGB")
    if image.mode in _UNBOUNDED:
        raise FractalError(f"pixels are {_UNBOUNDED[image.mode]}, whose range is unknown; convert it to 8 or 16 bits")
    return image.convert("RGB")


def _high_bytes(image: Image.Image) -> Pixels:
    """Return the eight highest bits of 16-bit grey, (H, W) uint8; TIFF also has 12-bit grey, and 0 as white."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    high: Pixels = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    return ~high if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else high
