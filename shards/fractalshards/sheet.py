"""A contact sheet: a labelled grid of images, a row per class. For people, to look at what a dataset holds."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fractalshards.errors import FractalError
from fractalshards.manifest import Manifest
from fractalshards.png import Pixels
from fractalshards.reader import decode_sample, index_split, iterate_shard

_GAP = 4
_LABEL_WIDTH = 44
_PAPER = (255, 255, 255)
_INK = (60, 60, 60)


def contact_sheet(rows: Mapping[str, Sequence[Pixels]], tile: int) -> Image.Image:
    """Draw rows of images with a label before each.

    Args:
        rows: images (H, W, 3) uint8 by row label; the longest row sets the width.
        tile: side length of an image on the sheet in pixels.
    """
    step = tile + _GAP
    columns = max(map(len, rows.values()))
    sheet = Image.new("RGB", (_LABEL_WIDTH + columns * step, len(rows) * step + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for row, (label, images) in enumerate(rows.items()):
        top = _GAP + row * step
        draw.text((_LABEL_WIDTH - _GAP, top + tile // 2), label, _INK, font, anchor="rm")
        for column, pixels in enumerate(images):
            shown = Image.fromarray(pixels).resize((tile, tile), Image.Resampling.LANCZOS)
            sheet.paste(shown, (_LABEL_WIDTH + column * step, top))
    return sheet


def sample_rows(manifest: Manifest, split: str, classes: int, per_class: int) -> dict[str, list[Pixels]]:
    """The first images of some classes, spread evenly over all of them, as rows for ``contact_sheet``.

    Raises:
        FractalError: if the split is missing or empty, or a sample cannot be read.
    """
    chosen = np.linspace(0, manifest.classes - 1, min(classes, manifest.classes)).round().astype(int).tolist()
    rows: dict[int, list[Pixels]] = {label: [] for label in chosen}
    for index in index_split(manifest, split):
        for sample in iterate_shard(index):
            image, label = decode_sample(sample, manifest.classes)
            if label in rows and len(rows[label]) < per_class:
                rows[label].append(image)
        if all(len(images) == per_class for images in rows.values()):
            break
    filled = {str(label): images for label, images in rows.items() if images}
    if not filled:
        raise FractalError(f"{manifest.folder}: no image to show in split {split!r}")
    return filled
