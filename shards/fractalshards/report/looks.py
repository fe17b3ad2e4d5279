"""What a report takes from one shard: thumbnails of some classes, and measures of some images. Runs in workers."""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from fractalshards.errors import FractalError
from fractalshards.labels import Label, MultiLabel, Object, classes_of, decode_label
from fractalshards.png import Pixels
from fractalshards.reader import ShardIndex, decode_sample, read_sample
from fractalshards.tarball import BLOCK, first_member_end

MAX_OBJECTS = 8  # boxes kept with a thumbnail
DETAIL = 32  # of 255: the difference between neighbours that counts as detail
_QUALITY = 75


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of a sample: WebP, of an image of ``width`` x ``height`` pixels with these objects, if any."""

    key: str
    width: int
    height: int
    webp: bytes
    objects: tuple[Object, ...]


@dataclass(frozen=True)
class Look:
    """Measures of one image.

    Attributes:
        width, height: in pixels.
        bytes: of the sample in its tar, headers included.
        fill: share of pixels that are not black; what FractalDB calls fill rate.
        detail: share of pixels that differ from one of their four neighbours by more than ``DETAIL`` in a channel.
        objects: objects in the label; 0 for label type ``single``.
        covered: share of the image that lies in the box of an object.
    """

    width: int
    height: int
    bytes: int
    fill: float
    detail: float
    objects: int
    covered: float


@dataclass(frozen=True)
class LookTask:
    """What to take from a shard: so many thumbnails by class, measures of these samples by position in the shard."""

    index: ShardIndex
    wanted: Mapping[int, int]
    looked: Sequence[int]
    classes: int
    tile: int


@dataclass(frozen=True)
class ShardLooks:
    """What was taken from a shard: (class, thumbnail) pairs, and measures."""

    thumbnails: tuple[tuple[int, Thumbnail], ...]
    looks: tuple[Look, ...]


def look_at_shard(task: LookTask) -> ShardLooks:
    """Take from a shard what the task asks for; fewer thumbnails where it has not as many samples of a class.

    Of the samples of a class those are taken that lie evenly spread over the shard.

    Raises:
        FractalError: if a sample cannot be read, naming it.
        OSError: if the shard cannot be read.
    """
    with task.index.path.open("rb") as file:
        reader = _Reader(task, file.fileno())
        chosen = _choose(reader, task) if task.wanted else ()
        looks = tuple(reader.look(position) for position in task.looked)
        return ShardLooks(tuple((label, reader.thumbnail(position)) for label, position in chosen), looks)


def measure(image: Pixels, label: Label, size: int) -> Look:
    """Measure an image (H, W, 3) uint8, whose sample takes ``size`` bytes."""
    height, width, _ = image.shape
    objects = label.objects if isinstance(label, MultiLabel) else ()
    covered = np.zeros((height, width), bool)
    for thing in objects:
        x, y, box_width, box_height = thing.bbox
        covered[y : y + box_height, x : x + box_width] = True
    return Look(
        width=width,
        height=height,
        bytes=size,
        fill=float(image.any(axis=2).mean()),
        detail=float(_detail(image).mean()),
        objects=len(objects),
        covered=float(covered.mean()),
    )


def shrink(image: Pixels, tile: int) -> bytes:
    """An image as WebP that fits into ``tile`` x ``tile`` pixels; a smaller one stays as it is."""
    picture = Image.fromarray(image)
    picture.thumbnail((tile, tile), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=_QUALITY)
    return stream.getvalue()


class _Reader:
    """An open shard; its errors name the shard and the sample."""

    def __init__(self, task: LookTask, descriptor: int) -> None:
        self._task = task
        self._descriptor = descriptor
        self._bounds = task.index.offsets.tolist()

    def labels(self) -> list[Label]:
        """The labels of all samples; their images are not read where the image comes first, as in our shards."""
        return [self._label(position) for position in range(len(self._bounds) - 1)]

    def look(self, position: int) -> Look:
        """Measures of a sample."""
        _, image, label = self._decode(position)
        return measure(image, label, self._bounds[position + 1] - self._bounds[position])

    def thumbnail(self, position: int) -> Thumbnail:
        """A small picture of a sample."""
        key, image, label = self._decode(position)
        height, width, _ = image.shape
        objects = label.objects[:MAX_OBJECTS] if isinstance(label, MultiLabel) else ()
        clipped = tuple(Object(thing.label, _clip(thing.bbox, width, height)) for thing in objects)
        return Thumbnail(key, width, height, shrink(image, self._task.tile), clipped)

    def _label(self, position: int) -> Label:
        start, end = self._bounds[position : position + 2]
        try:
            second = start + first_member_end(os.pread(self._descriptor, BLOCK, start))
            sample = read_sample(self._descriptor, second if second < end else start, end)
            if len(sample.files) > 1 or sample.files.keys().isdisjoint(("cls", "json")):
                sample = read_sample(self._descriptor, start, end)
            return decode_label(sample.files)
        except FractalError as error:
            raise self._failure(position, error) from error

    def _decode(self, position: int) -> tuple[str, Pixels, Label]:
        start, end = self._bounds[position : position + 2]
        try:
            sample = read_sample(self._descriptor, start, end)
            return sample.key, *decode_sample(sample, self._task.classes)
        except FractalError as error:
            raise self._failure(position, error) from error

    def _failure(self, position: int, error: FractalError) -> FractalError:
        path = self._task.index.path
        return FractalError(f"{path}: sample {position}: {error}; see 'fractalshards verify', fetch or build it again")


def _choose(reader: _Reader, task: LookTask) -> list[tuple[int, int]]:
    """(class, position) of the samples to show."""
    places: dict[int, list[int]] = {label: [] for label in task.wanted}
    for position, label in enumerate(reader.labels()):
        for one in classes_of(label):
            if one in places:
                places[one].append(position)
    return [(label, at) for label, found in places.items() for at in _spread(found, task.wanted[label])]


def _spread(places: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of some places, evenly spread."""
    if len(places) <= count:
        return list(places)
    return [places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count)]


def _detail(image: Pixels) -> npt.NDArray[np.bool_]:
    """Where an image differs from a neighbour, (H, W) bool."""
    found = np.zeros(image.shape[:2], np.bool_)
    for axis in (0, 1):
        rows = np.moveaxis(image, axis, 0)
        before, after = rows[:-1], rows[1:]  # differences of wider integers would take twice the memory of an image
        steps = (np.maximum(before, after) - np.minimum(before, after) > DETAIL).any(axis=2)
        along = np.moveaxis(found, axis, 0)
        along[1:] |= steps
        along[:-1] |= steps
    return found


def _clip(bbox: tuple[int, int, int, int], width: int, height: int) -> tuple[int, int, int, int]:
    x, y, box_width, box_height = bbox
    left, top = min(x, width), min(y, height)
    return left, top, min(box_width, width - left), min(box_height, height - top)
