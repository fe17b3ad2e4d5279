"""Random access to the samples of a dataset: sidecars give the offsets, and reading a sample is one pread."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fractalshards.errors import FractalError
from fractalshards.manifest import Manifest, Shard, read_record, split_shards
from fractalshards.png import Pixels, decode_image
from fractalshards.sample import Label, Sample, classes_of, decode_label, image_extension, parse_sample
from fractalshards.storage import regular_size


@dataclass(frozen=True)
class ShardIndex:
    """Offsets of the samples of a shard, (samples + 1,) int64: sample i is the bytes ``offsets[i]:offsets[i + 1]``."""

    path: Path
    offsets: npt.NDArray[np.int64]


def index_split(manifest: Manifest, split: str, whole: bool = True) -> tuple[ShardIndex, ...]:
    """Index all shards of a split from their sidecars, checked against the manifest and the files' sizes.

    If not ``whole``, tars may be missing, and their sizes are not checked.

    Raises:
        FractalError: if the split, a shard or a sidecar is missing, or they contradict each other.
    """
    shards = split_shards(manifest, split)
    return tuple(_index_shard(manifest, shard, whole) for shard in shards)


def read_sample(descriptor: int, start: int, end: int) -> Sample:
    """Read one sample from an open shard; safe from many processes and threads at once."""
    return parse_sample(read_blocks(descriptor, start, end))


def read_blocks(descriptor: int, start: int, end: int) -> bytes:
    """Read the bytes ``[start, end)`` of an open file: the tar blocks of one sample, or its image.

    Raises:
        FractalError: if the file ends early.
    """
    data = os.pread(descriptor, end - start, start)
    if len(data) != end - start:
        raise FractalError(f"file ends at byte {start + len(data)}, but the sample ends at {end}")
    return data


def decode_sample(sample: Sample, classes: int) -> tuple[Pixels, Label]:
    """Decode a sample to its image, (H, W, 3) uint8, and label.

    Raises:
        FractalError: if there is not one image and one label, the image is damaged or a class out of range.
    """
    label = decode_label(sample.files)
    if (largest := max(classes_of(label), default=0)) >= classes:
        raise FractalError(f"label {largest}, but there are {classes} classes")
    return decode_image(sample.files[image_extension(sample.files)]), label


def iterate_shard(index: ShardIndex) -> Iterator[Sample]:
    """Yield all samples of a shard in order.

    Raises:
        FractalError: at the first sample that cannot be read, naming the shard.
    """
    with index.path.open("rb") as file:
        for start, end in zip(index.offsets[:-1].tolist(), index.offsets[1:].tolist(), strict=True):
            try:
                yield read_sample(file.fileno(), start, end)
            except FractalError as error:
                raise FractalError(f"{index.path}: {error}; fetch or build it again") from error


def decode_shard(index: ShardIndex, classes: int) -> Iterator[tuple[Pixels, Label]]:
    """Yield the image, (H, W, 3) uint8, and label of all samples of a shard in order.

    Raises:
        FractalError: at the first sample that cannot be read or decoded, naming the shard and the sample.
    """
    for sample in iterate_shard(index):
        try:
            yield decode_sample(sample, classes)
        except FractalError as error:
            raise FractalError(f"{index.path}: {sample.key}: {error}; fetch or build it again") from error


def _index_shard(manifest: Manifest, shard: Shard, whole: bool) -> ShardIndex:
    path = manifest.folder / shard.name
    try:
        record = read_record(manifest.folder, shard.name, manifest.label_type)
        size = regular_size(path) if whole else record.bytes
    except FileNotFoundError as error:
        raise FractalError(f"{error.filename}: missing; fetch or build it again") from error
    if record.sha256 != shard.sha256:
        raise FractalError(f"{path}: its sidecar and the manifest disagree; fetch or build it again")
    if size != record.bytes:
        raise FractalError(f"{path}: {size} bytes instead of {record.bytes}; fetch or build it again")
    return ShardIndex(path, np.asarray(record.offsets, np.int64))
