"""PNG in and out: a fast path for 8-bit RGB images filtered with Sub, as this project writes them; Pillow else."""

import io
import struct
import warnings
import zlib

import numpy as np
import numpy.typing as npt
from isal import igzip_lib, isal_zlib
from PIL import Image

from fractalshards.errors import FractalError

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SUB = 1
_RGB8 = (8, 2, 0, 0, 0)  # bit depth, colour type, compression, filter, interlace
_LEVEL = 1  # of ISA-L's 0..3: the others are slower or larger, see docs/performance.md
_MAX_PIXELS = 64_000_000
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")  # others may run programs: EPS starts Ghostscript

Pixels = npt.NDArray[np.uint8]


def encode_png(pixels: Pixels) -> bytes:
    """Encode an image (H, W, 3) uint8 as an 8-bit RGB PNG, every row filtered with Sub, deflated by ISA-L.

    The pixels that any decoder gives back are exactly these; the bytes may differ between CPUs, because ISA-L
    chooses its code by CPU.
    """
    height, width, _ = pixels.shape
    flat = pixels.reshape(height, width * 3)
    rows = np.empty((height, 1 + width * 3), np.uint8)
    rows[:, 0] = _SUB
    rows[:, 1:4] = flat[:, :3]
    np.subtract(flat[:, 3:], flat[:, :-3], out=rows[:, 4:])
    header = struct.pack(">II5B", width, height, *_RGB8)
    data = isal_zlib.compress(rows, _LEVEL)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def decode_image(data: bytes) -> Pixels:
    """Decode an image to (H, W, 3) uint8 RGB: our own PNGs fast, any other image through Pillow.

    Raises:
        FractalError: if the data is damaged, truncated, not an image, or claims more than 64 million pixels.
    """
    pixels = _decode_own(data)
    return _decode_any(data) if pixels is None else pixels


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", isal_zlib.crc32(data, zlib.crc32(kind)))


def _decode_own(data: bytes) -> Pixels | None:
    """Decode the exact layout of ``encode_png``: IHDR, one IDAT, IEND; None for anything else."""
    if len(data) < 57 or data[:8] != _SIGNATURE or data[12:16] != b"IHDR" or data[37:41] != b"IDAT":
        return None
    width, height, *form = struct.unpack(">II5B", data[16:29])
    (length,) = struct.unpack(">I", data[33:37])
    if tuple(form) != _RGB8 or len(data) != 57 + length or not 0 < width * height <= _MAX_PIXELS:
        return None
    body = memoryview(data)[41 : 41 + length]
    if data[41 + length : 45 + length] != struct.pack(">I", isal_zlib.crc32(body, zlib.crc32(b"IDAT"))):
        return None
    size = height * (1 + width * 3)
    try:
        inflated = isal_zlib.decompressobj().decompress(body, size + 1)
    except igzip_lib.IsalError:  # type: ignore[misc]  # its stub declares the class as an instance
        return None
    if len(inflated) != size:
        return None
    rows = np.frombuffer(inflated, np.uint8).reshape(height, 1 + width * 3)
    if not (rows[:, 0] == _SUB).all():
        return None
    return np.add.accumulate(rows[:, 1:].reshape(height, width, 3), axis=1, dtype=np.uint8)


def _decode_any(data: bytes) -> Pixels:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about files that are odd but readable; sizes are checked here
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise FractalError(f"image claims {image.width} x {image.height} pixels")
                return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FractalError(f"image cannot be decoded: {error}") from error
