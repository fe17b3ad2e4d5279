"""A contact sheet of what a recipe would build, without building it."""

from collections.abc import Iterator

from PIL import Image

from fractalgen.color import Pixels, pixels_of
from fractalgen.kinds import find_kind
from fractalgen.recipe import Recipe
from fractalgen.render import draw_systems, render_unit
from fractalgen.unit import Unit
from fractalshards.labels import Label
from fractalshards.sheet import class_rows, contact_sheet

_PATIENCE = 8  # images per image shown, until rows of a multi-label kind may stay short


def preview(recipe: Recipe, per_class: int, tile: int) -> Image.Image:
    """Draw a labelled sheet, a row per class; images of several classes stand in the row of one of them.

    Args:
        per_class: images in a row.
        tile: side length of an image on the sheet in pixels.
    """
    rows = class_rows(_samples(recipe, per_class), range(recipe.classes), per_class, tile)
    return contact_sheet(rows, tile, title=recipe.kind)


def _samples(recipe: Recipe, per_class: int) -> Iterator[tuple[Pixels, Label]]:
    """Images of different units, class after class."""
    kind = find_kind(recipe.kind)
    systems = draw_systems(recipe)
    end = kind.units_per_class(recipe.params) or per_class * _PATIENCE
    for number in range(end):
        for label in range(recipe.classes):
            images = render_unit(recipe, systems, Unit(recipe.seed, "train", label, number))
            image, shown = images[number % len(images)]
            yield pixels_of(image), shown
