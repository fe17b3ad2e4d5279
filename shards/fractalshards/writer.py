"""Writes one shard: the tar first, then its sidecar record, each visible only when whole (law 2)."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from fractalshards.atomic import atomic_file, write_json
from fractalshards.digest import ContentDigest
from fractalshards.labels import SINGLE, encode_label
from fractalshards.manifest import ShardRecord
from fractalshards.names import sidecar_name
from fractalshards.png import Pixels
from fractalshards.tarball import END_OF_TAR, Sample, pack_sample


def write_shard(
    folder: Path,
    name: str,
    classes: int,
    samples: Iterable[tuple[str, Pixels, int]],
    encode: Callable[[Pixels], bytes],
) -> ShardRecord:
    """Write ``folder/name`` and its sidecar from (key, pixels (H, W, 3) uint8, class index) samples.

    Samples are streamed: memory does not grow with their number.

    Args:
        name: plain file name, see ``names.shard_name``.
        classes: number of classes of the dataset; labels are in [0, classes).
        encode: turns pixels into a PNG that decodes to the same pixels, e.g. ``png.encode_png``.

    Raises:
        OSError: as the file system does; then there is no sidecar, and so no shard that counts as finished.
    """
    sha256 = hashlib.sha256()
    content = ContentDigest()
    counts = [0] * classes
    offsets = [0]
    with atomic_file(folder / name) as file:
        for key, pixels, label in samples:
            text = encode_label(label)
            blocks = pack_sample(Sample(key, {"png": encode(pixels), SINGLE: text}))
            file.write(blocks)
            sha256.update(blocks)
            content.add(key, pixels, text)
            counts[label] += 1
            offsets.append(offsets[-1] + len(blocks))
        file.write(END_OF_TAR)
        sha256.update(END_OF_TAR)
    record = ShardRecord(
        name=name,
        samples=len(offsets) - 1,
        bytes=offsets[-1] + len(END_OF_TAR),
        sha256=sha256.hexdigest(),
        content_digest=content.hexdigest(),
        label_counts=tuple(counts),
        offsets=tuple(offsets),
    )
    write_json(folder / sidecar_name(name), record.to_json())
    return record
