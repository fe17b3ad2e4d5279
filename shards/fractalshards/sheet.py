"""Draw contact sheets: a labelled grid of images, one row per class."""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from fractalshards.errors import FractalError
from fractalshards.manifest import Manifest
from fractalshards.png import Pixels
from fractalshards.reader import decode_shard, index_split
from fractalshards.sample import Label, classes_of
from fractalshards.storage import write_bytes
from fractalshards.survey import choose_samples, select_samples, shrink, spread

_GAP = 4
_LABEL_WIDTH = 44
_TITLE_HEIGHT = 28
_PAPER = (255, 255, 255)
_INK = (60, 60, 60)

Rows = Mapping[str, Sequence[Image.Image]]


def contact_sheet(rows: Rows, tile: int, title: str = "") -> Image.Image:
    """Draw labelled rows of images, scaled to fit into ``tile`` x ``tile`` pixels, under an optional title."""
    step = tile + _GAP
    head = _TITLE_HEIGHT if title else 0
    size = _LABEL_WIDTH + max(map(len, rows.values())) * step, head + len(rows) * step + _GAP
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_LABEL_WIDTH, head), title, _INK, ImageFont.load_default(17), anchor="ld")
    for row, (label, images) in enumerate(rows.items()):
        top = head + _GAP + row * step
        draw.text((_LABEL_WIDTH - _GAP, top + tile // 2), label, _INK, ImageFont.load_default(13), anchor="rm")
        for column, image in enumerate(images):
            fitted = ImageOps.contain(image, (tile, tile), Image.Resampling.LANCZOS)
            left = _LABEL_WIDTH + column * step
            sheet.paste(fitted, (left + (tile - fitted.width) // 2, top + (tile - fitted.height) // 2))
    return sheet


def side_by_side(sheets: Sequence[Image.Image]) -> Image.Image:
    """Place sheets next to each other, aligned at the top."""
    whole = Image.new("RGB", (sum(sheet.width for sheet in sheets), max(sheet.height for sheet in sheets)), _PAPER)
    left = 0
    for sheet in sheets:
        whole.paste(sheet, (left, 0))
        left += sheet.width
    return whole


def class_rows(samples: Iterable[tuple[Pixels, Label]], classes: Sequence[int], per_class: int, tile: int) -> Rows:
    """Collect the first images of each class from a stream, as rows for ``contact_sheet``; empty rows are left out.

    An image of several classes goes to one of their rows, the one with the fewest images so far.
    """
    rows: dict[int, list[Image.Image]] = {label: [] for label in classes}
    for image, label in samples:
        candidates = [rows[one] for one in classes_of(label) if one in rows]
        if candidates and len(shortest := min(candidates, key=len)) < per_class:
            shortest.append(shrink(image, tile))
        if all(len(images) == per_class for images in rows.values()):
            break
    return {str(label): images for label, images in rows.items() if images}


def sample_rows(manifest: Manifest, split: str, classes: int, per_class: int, tile: int) -> Rows:
    """Read images of some classes, evenly spread, as rows; an image of several classes may be in several rows."""
    rows: dict[int, list[Image.Image]] = {label: [] for label in spread(manifest.classes, classes)}
    wanted = select_samples(manifest, split, list(rows), per_class)
    indices = index_split(manifest, split)
    for number, counts in wanted.items():
        chosen = choose_samples(indices[number], counts)
        decoded = decode_shard(indices[number], manifest.classes, [position for _, position in chosen])
        for (label, _), (_, image, _) in zip(chosen, decoded, strict=True):
            rows[label].append(shrink(image, tile))
    if not any(rows.values()):
        raise FractalError(f"{manifest.folder}: split {split!r} contains no images")
    return {str(label): images for label, images in rows.items() if images}


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture atomically, as PNG or JPEG by the end of its name; creates missing folders."""
    data = io.BytesIO()
    picture.save(data, "PNG" if path.suffix.lower() == ".png" else "JPEG", optimize=True, quality=85)
    write_bytes(path, data.getvalue())
