"""PNG: what any decoder reads is what was encoded; damage is an error, never a wrong image."""

import io
import resource
import struct
import zlib
from contextlib import suppress

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fractalshards.errors import FractalError
from fractalshards.png import decode_image, encode_png


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_every_decoder_reads_what_was_encoded(height: int, width: int, seed: int) -> None:
    image = picture(height, width, seed)
    data = encode_png(image)
    assert np.array_equal(decode_image(data), image)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
    assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1], image)


@pytest.mark.parametrize("options", [{"format": "PNG"}, {"format": "JPEG", "quality": 95}])
def test_images_of_others_are_decoded_as_pillow_does(options: dict[str, object]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(20, 30)).save(buffer, **options)
    assert np.array_equal(decode_image(buffer.getvalue()), np.asarray(Image.open(buffer)))


def test_palette_images_become_rgb() -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(20, 30)).quantize(7).save(buffer, "PNG")
    assert np.array_equal(decode_image(buffer.getvalue()), np.asarray(Image.open(buffer).convert("RGB")))


@given(st.data())
def test_a_changed_byte_is_noticed(data: st.DataObject) -> None:
    image = picture(9, 11)
    encoded = bytearray(encode_png(image))
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


@pytest.mark.parametrize(("side", "inflated"), [(100_000, 1000), (8, 300_000_000)])
def test_a_lying_size_costs_no_memory(side: int, inflated: int) -> None:
    header = struct.pack(">II5B", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(inflated))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b"")):
        parts += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(kind + data))]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(FractalError):
        assert decode_image(b"".join(parts)).shape == (side, side, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_formats_that_run_programs_are_not_opened() -> None:
    with pytest.raises(FractalError, match="cannot identify"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
