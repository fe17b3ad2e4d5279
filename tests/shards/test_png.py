"""PNG: every decoder reads the encoded pixels; damage is an error, never a wrong image."""

import io
import resource
import struct
from contextlib import suppress

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.io import ImageReadMode, decode_png

from damages import png
from fractalshards.errors import FractalError
from fractalshards.png import GREYS, Indexed, decode_image, encode_png


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


SIDES = st.integers(1, 40)


@given(SIDES, SIDES, st.sampled_from([0, 1, 2, 3, 129, 256]), st.integers(0, 9), st.booleans())
def test_round_trip_in_every_decoder(height, width, colors, seed, grey):
    image, pixels = (picture(height, width, seed),) * 2
    if colors:
        rng = np.random.default_rng(seed)
        palette = GREYS[:colors] if grey else rng.integers(0, 256, (colors, 3), dtype=np.uint8)
        image = Indexed(rng.integers(0, colors, (height, width), dtype=np.uint8), palette)
        pixels = palette[image.indices]
        assert np.array_equal(image.rgb(), pixels)
    data = encode_png(image)
    assert data[24:26] == bytes([1 if 0 < colors <= 2 else 8, 3 if colors else 2])  # bit depth, colour type
    assert np.array_equal(decode_image(data), pixels)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == ("P" if colors else "RGB")
        assert np.array_equal(np.asarray(opened.convert("RGB")), pixels)
    assert np.array_equal(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1], pixels)
    tensor = decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), pixels)


def test_palette_of_too_many_colours():
    data = png(3, 3, bytes(12), (b"PLTE", bytes(3 * 257)), color=3)
    with suppress(FractalError):
        assert decode_image(data).shape == (3, 3, 3)


def test_index_outside_of_the_palette_decodes_as_pillow_does():
    image = Indexed(np.full((3, 3), 5, np.uint8), np.zeros((4, 3), np.uint8))
    data = encode_png(image)
    assert np.array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def picture_of(mode: str, values: object, palette: tuple[int, ...] = ()) -> Image.Image:
    """Four pixels of a mode of Pillow from their bytes, each enlarged to a block of JPEG."""
    image = Image.frombytes(mode, (4, 1), np.asarray(values).tobytes())
    if palette:
        image.putpalette(palette)
    return image.resize((32, 8), Image.Resampling.NEAREST)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def tiff(values: object, width: int, **tags: int) -> bytes:
    """A TIFF of eight-bit grey with other bytes and numbers in its tags."""
    codes = {"width": 256, "bits": 258, "photometric": 262}
    pixels = np.frombuffer(np.asarray(values).tobytes(), np.uint8)[None]
    data = bytearray(saved(Image.fromarray(pixels), "TIFF"))
    for name, value in {"width": width, **tags}.items():
        at = data.index(struct.pack("<H", codes[name]), int.from_bytes(data[4:8], "little"))
        data[at + 8 : at + 12] = struct.pack("<I", value)
    return bytes(data)


LEVELS, WORDS = np.array([0, 1, 128, 255], np.uint8), np.array([0, 0x01FF, 0x8000, 0xFFFF])
GREY = [(0, 0, 0), (1, 1, 1), (128, 128, 128), (255, 255, 255)]
COLOURS = [(9, 0, 0), (0, 90, 0), (0, 0, 200), (255, 1, 128)]
WITH_ALPHA = [(*colour, alpha) for colour, alpha in zip(COLOURS, LEVELS.tolist(), strict=True)]
PALETTE = tuple(np.ravel(COLOURS).tolist())
RAINBOW = [(255, 255, 255), (0, 255, 255), (255, 0, 0), (0, 0, 0)]
INK = np.array([(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)], np.uint8)
YCBCR = np.array([(255, 128, 128), (179, 171, 0), (76, 85, 255), (0, 128, 128)], np.uint8)  # by JFIF's equations
LAB = np.array([(0, 0, 0), (128, 0, 0), (255, 0, 0), (128, 20, -30 % 256)], np.uint8)  # 2.55 L*, a*, b* of white D50
LAB_AS_RGB = [(0, 0, 0), (119, 119, 119), (255, 255, 255), (133, 109, 171)]


@pytest.mark.parametrize(
    ("image", "formats", "expected"),
    [
        (picture_of("1", np.uint8(0x40)), "PNG TIFF BMP PPM", [GREY[0], GREY[3], GREY[0], GREY[0]]),
        (picture_of("L", LEVELS), "PNG TIFF BMP PPM GIF JPEG", GREY),
        (picture_of("LA", np.stack([LEVELS, LEVELS[::-1]], 1)), "PNG TIFF", GREY),
        (picture_of("I;16", WORDS.astype("<u2")), "PNG TIFF PPM", GREY),
        (picture_of("I;16B", WORDS.astype(">u2")), "PNG TIFF", GREY),
        (picture_of("P", np.arange(4, dtype=np.uint8), PALETTE), "PNG TIFF BMP GIF", COLOURS),
        (picture_of("RGB", np.array(COLOURS, np.uint8)), "PNG TIFF BMP PPM WEBP", COLOURS),
        (picture_of("RGBA", np.array(WITH_ALPHA, np.uint8)), "PNG TIFF WEBP", COLOURS),
        (picture_of("CMYK", INK), "TIFF JPEG", RAINBOW),
        (picture_of("YCbCr", YCBCR), "TIFF JPEG", RAINBOW),
        (picture_of("LAB", LAB), "TIFF", LAB_AS_RGB),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_becomes_rgb(image, formats, expected):
    options = {"WEBP": {"lossless": True, "exact": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    for form in formats.split():
        found = decode_image(saved(image, form, **options.get(form, {})))[4, 4::8].astype(int)
        rounding = 1 if form == "JPEG" or image.mode in ("YCbCr", "LAB") else 0
        assert np.abs(found - expected).max() <= rounding, (form, found)


def test_transparent_colours_of_a_palette_keep_their_colour():
    image = picture_of("P", np.arange(4, dtype=np.uint8), PALETTE)
    for transparency in (1, bytes([0, 9, 255])):
        assert decode_image(saved(image, "PNG", transparency=transparency))[4, 4::8].tolist() == [*map(list, COLOURS)]


LZW = saved(Image.frombytes("I;16", (4, 1), WORDS.astype("<u2").tobytes()), "TIFF", compression="tiff_lzw")
DEPTHS = {
    "lzw": (LZW, [0, 1, 128, 255]),
    "16-bit": (tiff(WORDS.astype("<u2"), 4, bits=16), [0, 1, 128, 255]),
    "16-bit inverted": (tiff(WORDS.astype("<u2"), 4, bits=16, photometric=0), [255, 254, 127, 0]),  # 0 is white
    "8-bit inverted": (tiff(LEVELS, 4, photometric=0), [255, 254, 127, 0]),
    "12-bit": (tiff(np.array([0x00, 0x00, 0x1F, 0x80, 0x0F, 0xFF], np.uint8), 4, bits=12), [0, 1, 128, 255]),
    "pgm 12": (b"P5 4 1 4095\n" + (WORDS >> 4).astype(">u2").tobytes(), [0, 1, 128, 255]),
    "pgm 4": (b"P5 4 1 15\n" + bytes([0, 1, 8, 15]), [0, 17, 136, 255]),
    "plain pgm": (b"P2 4 1 1000\n0 4 502 1000\n", [0, 1, 128, 255]),
    "ppm 16": (b"P6 4 1 65535\n" + np.repeat(WORDS, 3).astype(">u2").tobytes(), [0, 2, 128, 255]),
    "ppm 10": (b"P6 4 1 1023\n" + np.repeat([0, 4, 512, 1023], 3).astype(">u2").tobytes(), [0, 1, 128, 255]),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_levels_of_any_depth_are_scaled(name):
    data, expected = DEPTHS[name]
    assert decode_image(data)[0].tolist() == [[level] * 3 for level in expected]


@pytest.mark.parametrize(("mode", "noun"), [("I", "32-bit"), ("F", "floats")])
def test_levels_without_a_range_are_refused(mode, noun):
    data = saved(Image.new(mode, (3, 3), 1), "TIFF")
    with pytest.raises(FractalError, match=noun):
        decode_image(data)


def test_first_frame_counts_and_orientation_does_not():
    first, second = (Image.new("RGB", (4, 2), colour) for colour in ("red", "blue"))
    for form in ("TIFF", "GIF", "PNG", "WEBP"):
        pixels = decode_image(saved(first, form, save_all=True, append_images=[second]))
        assert pixels[0, 0, 0] > 250 > 5 > pixels[0, 0, 2], form
    rotated = Image.Exif()
    rotated[0x0112] = 6
    assert decode_image(saved(first, "JPEG", exif=rotated)).shape == (2, 4, 3)


@given(st.data())
def test_changed_byte_is_an_error(data):
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


def damaged_index() -> bytes:
    """A palette image with a wrong bit in its pixels, which Pillow does not notice."""
    data = bytearray(saved(Image.fromarray(picture(20, 20)).quantize(7), "PNG"))
    data[data.index(b"IDAT") + 4 + 20] ^= 1
    return bytes(data)


def damaged_tag() -> bytes:
    """A TIFF in which the offset of the pixels has the type of a fraction."""
    data, strip_offsets = saved(Image.fromarray(picture(8, 8)), "TIFF"), struct.pack("<HHI", 273, 4, 1)
    assert data.count(strip_offsets) == 1
    return data.replace(strip_offsets, struct.pack("<HHI", 273, 5, 1))


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"  # would start Ghostscript
CUT_OFF = [encode_png(picture(20, 20))[:length] for length in (0, 7, 8, 30, 56, 200)]


@pytest.mark.parametrize("data", [*CUT_OFF, damaged_index(), damaged_tag(), POSTSCRIPT])
def test_damage_is_an_error(data):
    with pytest.raises(FractalError, match="cannot be decoded"):
        decode_image(data)


@pytest.mark.parametrize(("side", "inflated"), [(100_000, 1000), (8, 300_000_000)])
def test_false_size_takes_no_memory(side, inflated):
    data = png(side, side, bytes(inflated))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(FractalError):
        assert decode_image(data).shape == (side, side, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes
