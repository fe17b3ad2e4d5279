"""The label of a sample and its file in the tar: ``KEY.cls``, one class, or ``KEY.json``, the objects of an image."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from fractalshards.errors import FractalError
from fractalshards.fields import Fields

LabelType = Literal["single", "multi"]
LABEL_TYPES: tuple[LabelType, ...] = get_args(LabelType)

_SINGLE = "cls"
_MULTI = "json"
_MAX_DIGITS = 9
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Object:
    """One object of an image: its class index, and the box [x, y, width, height] of what is visible, in pixels."""

    label: int
    bbox: tuple[int, int, int, int]


@dataclass(frozen=True)
class MultiLabel:
    """What is visible in an image: its classes, sorted and unique, and its objects in paint order, one or more."""

    labels: tuple[int, ...]
    objects: tuple[Object, ...]

    @classmethod
    def of(cls, objects: tuple[Object, ...]) -> "MultiLabel":
        """The label of an image with these objects."""
        return cls(tuple(sorted({thing.label for thing in objects})), objects)


Label = int | MultiLabel


def find_label_type(name: str, where: str) -> LabelType:
    """The label type with a name that was found in ``where``.

    Raises:
        FractalError: if there is none.
    """
    for known in LABEL_TYPES:
        if known == name:
            return known
    raise FractalError(f"{where}: label_type {name!r} is not known; upgrade fractalpretrain")


def classes_of(label: Label) -> tuple[int, ...]:
    """The class indices of a label."""
    return (label,) if isinstance(label, int) else label.labels


def encode_label(label: Label) -> tuple[str, bytes]:
    """The extension and the bytes of the label's file.

    ``cls``: the class index in ASCII digits. ``json``: ``labels`` and ``objects`` with ``class`` and ``bbox``.
    """
    if isinstance(label, int):
        return _SINGLE, b"%d" % label
    objects = [{"class": thing.label, "bbox": thing.bbox} for thing in label.objects]
    return _MULTI, json.dumps({"labels": label.labels, "objects": objects}, separators=(",", ":")).encode()


def label_extension(files: Mapping[str, bytes]) -> str:
    """Which of a sample's files, by extension, is its label.

    Raises:
        FractalError: if there is not exactly one.
    """
    found = [extension for extension in (_SINGLE, _MULTI) if extension in files]
    if len(found) != 1:
        raise FractalError(f"expected one label, .{_SINGLE} or .{_MULTI}, in {sorted(files)}")
    return found[0]


def decode_label(files: Mapping[str, bytes]) -> Label:
    """The label of a sample from its files by extension.

    Raises:
        FractalError: if there is not one label file, it is not an ASCII integer of at most nine digits, or its JSON
            is not that of ``encode_label``: class indices sorted and unique, those of the objects.
    """
    extension = label_extension(files)
    text = files[extension]
    if extension == _MULTI:
        return _decode_objects(text)
    if not (text.isdigit() and len(text) <= _MAX_DIGITS):
        raise FractalError(f"label {text[:20]!r} is not a class index")
    return int(text)


def _decode_objects(text: bytes) -> MultiLabel:
    if len(text) > _MAX_BYTES:
        raise FractalError(f"label of {len(text):,} bytes is too long")
    fields = Fields.parse(text, "label")
    label = MultiLabel.of(tuple(Object(thing.count("class"), _box(thing)) for thing in fields.inners("objects")))
    if not label.objects:
        raise FractalError("no object in the label")
    if fields.counts("labels") != label.labels:
        raise FractalError("labels are not the classes of the objects, sorted and unique")
    return label


def _box(thing: Fields) -> tuple[int, int, int, int]:
    box = thing.counts("bbox")
    if len(box) != 4 or 0 in box[2:]:
        raise FractalError(f"bbox {box} is not [x, y, width, height]")
    return box[0], box[1], box[2], box[3]
