"""Digests: sha256 identifies one copy of a file, the content digest identifies the samples in it."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from fractalshards.sample import PNG, Sample, image_extension, label_extension

_CHUNK = 1 << 20


class ContentDigest:
    """Running xxh3-128 over (key, image, label) of samples, in order.

    Per sample the hashed bytes are ``KEY NUL``, ``hashed_image``, ``NUL LABEL NUL`` with the bytes of the label file.
    """

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def add(self, sample: Sample, pixels: npt.NDArray[np.uint8]) -> None:
        """Add one sample as it is stored, and the ``pixels`` of its image, (H, W, 3) uint8."""
        self._state.update(sample.key.encode() + b"\0")
        for part in hashed_image(sample, pixels):
            self._state.update(part)
        self._state.update(b"\0" + sample.files[label_extension(sample.files)] + b"\0")

    def hexdigest(self) -> str:
        """The digest so far, 32 hexadecimal digits."""
        return self._state.hexdigest()


def hashed_image(sample: Sample, pixels: npt.NDArray[np.uint8]) -> Iterator[bytes | memoryview]:
    """What identifies the image of a sample, whose ``pixels`` are (H, W, 3) uint8, in parts.

    Of a PNG that is ``HEIGHTxWIDTH NUL`` and the RGB pixels row by row: PNG encoding does not enter. Of other formats
    it is ``file SIZE NUL`` and the bytes of the image file, for decoders of lossy formats may differ in pixels.
    """
    extension = image_extension(sample.files)
    if extension == PNG:
        height, width, _ = pixels.shape
        yield f"{height}x{width}\0".encode()
        yield np.ascontiguousarray(pixels).data
    else:
        data = sample.files[extension]
        yield b"file %d\0" % len(data)
        yield data


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, 64 hexadecimal digits, in constant memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def systems_digest(systems: Sequence[npt.NDArray[np.float64]]) -> str:
    """xxh3-128 over the shapes and values of all systems, independent of how a file stores them."""
    state = xxhash.xxh3_128()
    for system in systems:
        state.update("x".join(map(str, system.shape)).encode() + b"\0")
        state.update(np.ascontiguousarray(system, dtype="<f8").data)
    return state.hexdigest()


def mapping_digest(canonical: Mapping[str, object]) -> str:
    """xxh3-128 of a JSON-like mapping, independent of the order of its keys."""
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return xxhash.xxh3_128(text.encode()).hexdigest()
