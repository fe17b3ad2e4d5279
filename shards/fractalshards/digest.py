"""Digests: sha256 identifies one copy of a file, the content digest identifies the samples in it."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from fractalshards.sample import PNG, Sample, image_extension, label_extension


class ContentDigest:
    """Running xxh3-128 over samples, in order: ``KEY NUL``, the bytes of ``hashed_image``, ``NUL LABEL NUL``."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_128()

    def add(self, sample: Sample, pixels: npt.NDArray[np.uint8]) -> None:
        """Add a stored sample and the ``pixels`` of its image, (H, W, 3) uint8."""
        self._state.update(sample.key.encode() + b"\0")
        for part in hashed_image(sample, pixels):
            self._state.update(part)
        self._state.update(b"\0" + sample.files[label_extension(sample.files)] + b"\0")

    def hexdigest(self) -> str:
        """Return the digest so far, 32 hexadecimal digits."""
        return self._state.hexdigest()


def hashed_image(sample: Sample, pixels: npt.NDArray[np.uint8]) -> Iterator[bytes | memoryview]:
    """Yield the bytes that identify the image of a sample, given its ``pixels``, (H, W, 3) uint8.

    For a PNG, ``HEIGHTxWIDTH NUL`` and the RGB pixels row by row, so its encoding does not matter. For other formats,
    ``file SIZE NUL`` and the image file, because decoders of lossy formats differ.
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
    """Return the sha256 of a file, 64 hexadecimal digits, in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def systems_digest(systems: Sequence[npt.NDArray[np.float64]]) -> str:
    """Return the xxh3-128 of the shapes and values of all systems, however a file stores them."""
    state = xxhash.xxh3_128()
    for system in systems:
        state.update("x".join(map(str, system.shape)).encode() + b"\0")
        state.update(np.ascontiguousarray(system, dtype="<f8").data)
    return state.hexdigest()


def mapping_digest(canonical: Mapping[str, object]) -> str:
    """Return the xxh3-128 of a JSON-like mapping, whatever the order of its keys."""
    text = json.dumps(canonical, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return xxhash.xxh3_128(text.encode()).hexdigest()
