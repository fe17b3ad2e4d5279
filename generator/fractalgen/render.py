"""Renders samples: the pure function from (recipe, systems, index) to image and label."""

import operator
from collections.abc import Iterator, Sequence
from itertools import islice

from PIL import Image

from fractalgen.kernels import MAX_MAPS
from fractalgen.kinds.kind import Unit
from fractalgen.plan import locate
from fractalgen.recipe import Recipe
from fractalshards.errors import FractalError
from fractalshards.manifest import SYSTEMS, sample_key
from fractalshards.png import Pixels, pixels_of
from fractalshards.sample import Label
from fractalshards.sheet import class_rows, contact_sheet
from fractalshards.systems import Systems
from fractalshards.workers import OnProgress, no_progress
from fractalshards.writer import Rendered


def draw_systems(recipe: Recipe, on_progress: OnProgress = no_progress) -> Systems:
    """Draw the system of every class of a recipe. Store them: another version of numpy may draw others.

    They are float64, (maps, 2, 3), (maps, 7) for FractalDB categories, or (1, 12) for contours. Kinds that take long
    call ``on_progress`` with the classes done and all classes. Raises UsageError if the kind has fewer systems.
    """
    recipe.family.prepare(recipe.params, recipe.classes, on_progress)
    return recipe.family.draw_systems(recipe.params, recipe.seed, recipe.classes)


def check_systems(recipe: Recipe, systems: Systems, where: object) -> None:
    """Raise a FractalError that names ``where`` unless systems have the number and shape that the kind renders."""
    shape = recipe.family.map_shape
    fitting = all(system.shape[1:] == shape and 1 <= len(system) <= MAX_MAPS for system in systems)
    if len(systems) != recipe.classes or not fitting:
        raise FractalError(
            f"{where}: kind {recipe.kind} needs {recipe.classes} systems of 1 to {MAX_MAPS} rows of shape {shape}; "
            f"check {SYSTEMS}, or the file that the systems come from"
        )


def render_sample(recipe: Recipe, systems: Systems, index: int, epoch: int = 0) -> tuple[Pixels, Label]:
    """Render sample ``index`` of a dataset.

    Raises IndexError if the index is out of range.

    Args:
        recipe: the dataset's recipe.
        systems: one float64 array per class, see ``draw_systems``.
        index: sample index in [0, n + val).
        epoch: 0 for the images of a build, else that of a training on fresh images, see ``plan.locate``.

    Returns:
        The image, (size, size, 3) uint8 RGB, and its label: a class index, or for kind ``multi`` a
        ``fractalshards.sample.MultiLabel`` of the classes and objects that are visible.
    """
    place = locate(recipe, operator.index(index), epoch)  # accepts numpy's integers, too
    image, label = render_unit(recipe, systems, place.unit)[place.part]
    return pixels_of(image), label


def render_unit(recipe: Recipe, systems: Systems, unit: Unit) -> Sequence[Rendered]:
    """Return all images of a unit, with their labels; some kinds render an image only when it is read."""
    return recipe.family.render(recipe.params, recipe.size, recipe.points, unit, systems)


def render_range(recipe: Recipe, systems: Systems, first: int, stop: int) -> Iterator[tuple[str, Rendered]]:
    """Yield (key, (image, label)) for samples ``first`` to ``stop - 1``.

    A unit is rendered when its first image is needed, and kept until its last one has been yielded.
    """
    waiting: dict[Unit, tuple[Sequence[Rendered], int]] = {}
    for index in range(first, stop):
        place = locate(recipe, index)
        if place.unit not in waiting:
            waiting[place.unit] = tuple(islice(render_unit(recipe, systems, place.unit), place.parts)), place.parts
        images, left = waiting.pop(place.unit)
        if left > 1:
            waiting[place.unit] = images, left - 1
        yield sample_key(index), images[place.part]


_PATIENCE = 8  # renders per image shown, after which rows of a multi-label kind may stay short


def preview(recipe: Recipe, per_class: int, tile: int) -> Image.Image:
    """Draw a contact sheet: a row of ``per_class`` images per class, each ``tile`` pixels wide and high.

    Every image is from another unit. One of several classes appears in the row of one of them.
    """
    rows = class_rows(_samples(recipe, per_class), range(recipe.classes), per_class, tile)
    return contact_sheet(rows, tile, title=recipe.kind)


def _samples(recipe: Recipe, per_class: int) -> Iterator[tuple[Pixels, Label]]:
    systems = draw_systems(recipe)
    for number in range(recipe.family.units_per_class(recipe.params) or per_class * _PATIENCE):
        for label in range(recipe.classes):
            images = render_unit(recipe, systems, Unit(recipe.seed, "train", label, number))
            image, shown = images[number % len(images)]
            yield pixels_of(image), shown
