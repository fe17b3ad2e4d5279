"""A contact sheet: a labelled grid of images, a row per class. For people, to look at what a dataset holds."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fractalshards.errors import FractalError, UsageError
from fractalshards.manifest import Manifest
from fractalshards.png import Pixels
from fractalshards.reader import decode_shard, index_split
from fractalshards.sample import Label, classes_of
from fractalshards.storage import atomic_file

_GAP = 4
_LABEL_WIDTH = 44
_TITLE_HEIGHT = 28
_PAPER = (255, 255, 255)
_INK = (60, 60, 60)
_FORMATS = {".png": "PNG", ".jpg": "JPEG"}


def contact_sheet(rows: Mapping[str, Sequence[Pixels]], tile: int, title: str = "") -> Image.Image:
    """Draw rows of images with a label before each, and a title above all.

    Args:
        rows: images (H, W, 3) uint8 by row label; the longest row sets the width.
        tile: side length of an image on the sheet in pixels.
    """
    step = tile + _GAP
    columns = max(map(len, rows.values()))
    head = _TITLE_HEIGHT if title else 0
    sheet = Image.new("RGB", (_LABEL_WIDTH + columns * step, head + len(rows) * step + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_LABEL_WIDTH, head), title, _INK, ImageFont.load_default(17), anchor="ld")
    for row, (label, images) in enumerate(rows.items()):
        top = head + _GAP + row * step
        draw.text((_LABEL_WIDTH - _GAP, top + tile // 2), label, _INK, ImageFont.load_default(13), anchor="rm")
        for column, pixels in enumerate(images):
            sheet.paste(Image.fromarray(_shrink(pixels, tile)), (_LABEL_WIDTH + column * step, top))
    return sheet


def side_by_side(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets beside each other, their tops in line."""
    whole = Image.new("RGB", (sum(sheet.width for sheet in sheets), max(sheet.height for sheet in sheets)), _PAPER)
    left = 0
    for sheet in sheets:
        whole.paste(sheet, (left, 0))
        left += sheet.width
    return whole


def class_rows(
    samples: Iterable[tuple[Pixels, Label]], classes: Sequence[int], per_class: int, tile: int
) -> dict[str, list[Pixels]]:
    """The first images that show each of some classes, as rows for ``contact_sheet``; empty rows are left out.

    An image stands in one row: of the rows of its classes the one with the fewest images so far. Images are kept as
    tiles, (tile, tile, 3) uint8, for there may be many.
    """
    rows: dict[int, list[Pixels]] = {label: [] for label in classes}
    for image, label in samples:
        shown = [rows[one] for one in classes_of(label) if one in rows]
        if shown and len(shortest := min(shown, key=len)) < per_class:
            shortest.append(_shrink(image, tile))
        if all(len(images) == per_class for images in rows.values()):
            break
    return {str(label): images for label, images in rows.items() if images}


def sample_rows(manifest: Manifest, split: str, classes: int, per_class: int, tile: int) -> dict[str, list[Pixels]]:
    """The rows of some classes of a dataset, spread evenly over all of them.

    Raises:
        FractalError: if the split is missing or empty, or a sample cannot be read.
    """
    chosen = np.linspace(0, manifest.classes - 1, min(classes, manifest.classes)).round().astype(int).tolist()
    shards = index_split(manifest, split)
    samples = chain.from_iterable(decode_shard(shard, manifest.classes) for shard in shards)
    rows = class_rows(samples, chosen, per_class, tile)
    if not rows:
        raise FractalError(f"{manifest.folder}: no image to show in split {split!r}")
    return rows


def _shrink(image: Pixels, tile: int) -> Pixels:
    if image.shape[:2] == (tile, tile):
        return image
    return np.asarray(Image.fromarray(image).resize((tile, tile), Image.Resampling.LANCZOS))


def picture_format(path: Path) -> str:
    """The format, ``PNG`` or ``JPEG``, that the name of a picture asks for.

    Raises:
        UsageError: if it is another.
    """
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(f"--out is {path}: expected a name that ends in {' or '.join(_FORMATS)}")
    return _FORMATS[path.suffix.lower()]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture, atomically, in the format that its name asks for; missing folders are made.

    Raises:
        UsageError: if that is neither PNG nor JPEG.
        OSError: if it cannot be written.
    """
    form = picture_format(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        picture.save(file, form, optimize=True, quality=85)
