"""Writes one shard: the tar first, then its sidecar record, each visible only when whole."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fractalshards.atomic import atomic_file, write_json
from fractalshards.digest import ContentDigest
from fractalshards.errors import FractalError
from fractalshards.images import PNG
from fractalshards.labels import Label, classes_of, encode_label
from fractalshards.manifest import MAX_SAMPLE_BYTES, ShardRecord
from fractalshards.names import sidecar_name
from fractalshards.png import Indexed, Pixels, encode_png
from fractalshards.tarball import END_OF_TAR, Sample, pack_sample, packed_size

Rendered = tuple[Pixels | Indexed, Label]  # an image, (H, W, 3) uint8 or indexed, and its label
Encode = Callable[[Pixels | Indexed], bytes]


@dataclass(frozen=True)
class Encoded:
    """A sample as a shard stores it, and what that says: the pixels, (H, W, 3) uint8, and the label."""

    sample: Sample
    pixels: Pixels
    label: Label


def pixels_of(image: Pixels | Indexed) -> Pixels:
    """The pixels of an image, (H, W, 3) uint8."""
    return image.rgb() if isinstance(image, Indexed) else image


def write_shard(
    folder: Path,
    name: str,
    classes: int,
    samples: Iterable[tuple[str, Rendered]],
    encode: Encode = encode_png,
    expand: Callable[[Pixels | Indexed], Pixels] = pixels_of,
) -> ShardRecord:
    """Write ``folder/name`` and its sidecar from (key, (image, label)) samples; see ``write_samples``.

    Args:
        encode: turns an image into a PNG that decodes to the same pixels.
        expand: turns an image into its pixels, which are hashed.
    """
    encoded = (
        Encoded(_encode_rendered(key, (image, label), encode), expand(image), label) for key, (image, label) in samples
    )
    return write_samples(folder, name, classes, encoded)


def write_samples(folder: Path, name: str, classes: int, samples: Iterable[Encoded]) -> ShardRecord:
    """Write ``folder/name`` and its sidecar from samples that are encoded already.

    Samples are streamed: memory does not grow with their number.

    Args:
        name: plain file name, see ``names.shard_name``.
        classes: number of classes of the dataset; labels are in [0, classes).

    Raises:
        FractalError: if a sample is larger than readers take.
        OSError: as the file system does. After either there is no sidecar, and so no shard that counts as finished.
    """
    sha256 = hashlib.sha256()
    content = ContentDigest()
    counts = [0] * classes
    offsets = [0]
    sides: set[int] = set()
    with atomic_file(folder / name) as file:
        for encoded in samples:
            check_size(encoded.sample)
            blocks = pack_sample(encoded.sample)
            file.write(blocks)
            sha256.update(blocks)
            content.add(encoded.sample, encoded.pixels)
            for index in classes_of(encoded.label):
                counts[index] += 1
            offsets.append(offsets[-1] + len(blocks))
            sides.update(encoded.pixels.shape[:2])
        file.write(END_OF_TAR)
        sha256.update(END_OF_TAR)
    record = ShardRecord(
        name=name,
        samples=len(offsets) - 1,
        bytes=offsets[-1] + len(END_OF_TAR),
        sha256=sha256.hexdigest(),
        content_digest=content.hexdigest(),
        label_counts=tuple(counts),
        image_size=sides.pop() if len(sides) == 1 else None,
        offsets=tuple(offsets),
    )
    write_json(folder / sidecar_name(name), record.to_json())
    return record


def check_size(sample: Sample) -> None:
    """Raise a FractalError if a sample is larger than readers take: its shard would never count as finished."""
    if (size := packed_size(sample)) > MAX_SAMPLE_BYTES:
        raise FractalError(f"a sample of {size:,} bytes, but it may have {MAX_SAMPLE_BYTES >> 20} MiB at most")


def pack_rendered(key: str, rendered: Rendered, encode: Encode = encode_png) -> bytes:
    """The tar blocks of one sample: its PNG, then its label."""
    return pack_sample(_encode_rendered(key, rendered, encode))


def _encode_rendered(key: str, rendered: Rendered, encode: Encode) -> Sample:
    image, label = rendered
    extension, text = encode_label(label)
    return Sample(key, {PNG: encode(image), extension: text})
