"""PNG: every decoder reads the encoded pixels; damage is an error, never a wrong image."""

import io
import resource
import struct
import zlib
from contextlib import suppress

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.io import ImageReadMode, decode_png

from fractalshards.errors import FractalError
from fractalshards.png import Indexed, decode_image, encode_png


def png(width: int, height: int, color: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 8 bits per value of a colour type, with these chunks between IHDR and IEND."""
    header = struct.pack(">II5B", width, height, 8, color, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        parts += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(kind + data))]
    return b"".join(parts)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def read_with_torchvision(data: bytes) -> np.ndarray:
    tensor = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    return tensor.permute(1, 2, 0).numpy()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_round_trip_in_every_decoder(height: int, width: int, seed: int) -> None:
    image = picture(height, width, seed)
    data = encode_png(image)
    assert np.array_equal(decode_image(data), image)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
    assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1], image)
    assert np.array_equal(read_with_torchvision(data), image)


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 3, 129, 256]), st.integers(0, 9))
def test_indexed_round_trip_in_every_decoder(height: int, width: int, colors: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    palette = rng.integers(0, 256, (colors, 3), dtype=np.uint8)
    image = Indexed(rng.integers(0, colors, (height, width), dtype=np.uint8), palette)
    pixels = palette[image.indices]
    assert np.array_equal(image.rgb(), pixels)
    data = encode_png(image)
    assert np.array_equal(decode_image(data), pixels)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == "P"
        assert np.array_equal(np.asarray(opened.convert("RGB")), pixels)
    assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1], pixels)
    assert np.array_equal(read_with_torchvision(data), pixels)


def test_two_colours_take_one_bit_per_pixel() -> None:
    indices = np.random.default_rng(0).integers(0, 2, (362, 362), dtype=np.uint8)
    data = encode_png(Indexed(indices, np.array([[0, 0, 0], [127, 127, 127]], np.uint8)))
    assert data[24:26] == bytes([1, 3])  # bit depth, colour type
    assert len(data) < 362 * 47 + 200


def test_palette_of_too_many_colours() -> None:
    data = png(3, 3, 3, (b"PLTE", bytes(3 * 257)), (b"IDAT", zlib.compress(bytes(12))))
    with suppress(FractalError):
        assert decode_image(data).shape == (3, 3, 3)


def test_index_outside_of_the_palette_decodes_as_pillow_does() -> None:
    image = Indexed(np.full((3, 3), 5, np.uint8), np.zeros((4, 3), np.uint8))
    data = encode_png(image)
    assert np.array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(("form", "colors"), [("PNG", None), ("PNG", 7), ("JPEG", None)])
def test_other_images_decode_as_pillow_does(form: str, colors: int | None) -> None:
    image, buffer = Image.fromarray(picture(20, 30)), io.BytesIO()
    (image.quantize(colors) if colors else image).save(buffer, form)
    assert np.array_equal(decode_image(buffer.getvalue()), np.asarray(Image.open(buffer).convert("RGB")))


@given(st.data())
def test_changed_byte_is_an_error(data: st.DataObject) -> None:
    rng = np.random.default_rng(0)
    indexed = Indexed(rng.integers(0, 3, (9, 11), dtype=np.uint8), rng.integers(0, 256, (3, 3), dtype=np.uint8))
    original = data.draw(st.sampled_from([picture(9, 11), indexed]))
    image = original.rgb() if isinstance(original, Indexed) else original
    encoded = bytearray(encode_png(original))
    position = data.draw(st.integers(0, len(encoded) - 13))  # the closing IEND chunk carries no pixels
    encoded[position] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode_image(bytes(encoded))
    except FractalError:
        return
    assert np.array_equal(decoded, image)


@pytest.mark.parametrize("length", [0, 7, 8, 30, 56, 200])
def test_truncation_is_an_error(length: int) -> None:
    with pytest.raises(FractalError, match="cannot be decoded"):
        decode_image(encode_png(picture(20, 20))[:length])


def test_damage_that_pillow_misses_is_an_error() -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(20, 20)).quantize(7).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[data.index(b"IDAT") + 4 + 20] ^= 1
    with pytest.raises(FractalError, match="IDAT"):
        decode_image(bytes(data))


@pytest.mark.parametrize(("side", "inflated"), [(100_000, 1000), (8, 300_000_000)])
def test_false_size_takes_no_memory(side: int, inflated: int) -> None:
    data = png(side, side, 2, (b"IDAT", zlib.compress(bytes(inflated))))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(FractalError):
        assert decode_image(data).shape == (side, side, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_damage_that_pillow_does_not_expect_is_an_error() -> None:
    """The offset of the pixels has the type of a fraction."""
    buffer = io.BytesIO()
    Image.fromarray(picture(8, 8)).save(buffer, "TIFF")
    data = buffer.getvalue()
    strip_offsets = struct.pack("<HHI", 273, 4, 1)
    assert data.count(strip_offsets) == 1
    with pytest.raises(FractalError, match="cannot be decoded"):
        decode_image(data.replace(strip_offsets, struct.pack("<HHI", 273, 5, 1)))


def test_postscript_is_not_opened() -> None:
    with pytest.raises(FractalError, match="cannot be decoded"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
