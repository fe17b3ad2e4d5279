"""Renders samples: the pure function from (recipe, systems, index) to image and label, and splits made of it."""

import operator
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from PIL import Image

from fractalgen.kernels import MAX_MAPS
from fractalgen.kinds.kind import Unit
from fractalgen.plan import locate, shard_tasks
from fractalgen.recipe import Recipe, parse_recipe
from fractalshards.errors import FractalError, UsageError
from fractalshards.manifest import sample_key
from fractalshards.png import Pixels, pixels_of
from fractalshards.reader import Example
from fractalshards.recipe_file import read_portable
from fractalshards.sample import Label, classes_of
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
        wanted = f"{recipe.classes} systems of 1 to {MAX_MAPS} rows of shape {shape}"
        raise FractalError(f"{where}: kind {recipe.kind} needs {wanted}; fetch the systems again")


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

    A unit is rendered when its first image is needed; every image is kept until it is yielded.
    """
    waiting: dict[Unit, dict[int, Rendered]] = {}  # images by their number in the unit
    for index in range(first, stop):
        place = locate(recipe, index)
        if place.unit not in waiting:
            waiting[place.unit] = dict(enumerate(islice(render_unit(recipe, systems, place.unit), place.parts)))
        images = waiting[place.unit]
        yield sample_key(index), images.pop(place.part)
        if not images:
            del waiting[place.unit]


class RenderedSplit:
    """A split, ``train`` or ``val``, whose samples are rendered when they are read: those that its shards would hold.

    Attributes:
        digest: identifies the dataset: its content digest if it was ever built, else the digest of its recipe.
        lengths: samples per shard that a build would write.
        fresh: every epoch shows new images; see ``read``.
    """

    class_names: tuple[str, ...] = ()  # classes have none

    def __init__(self, source: Path | Recipe, split: str = "train", fresh: bool = False) -> None:
        """Open a split of the dataset that a recipe, or the file of a portable one, describes.

        Raises FractalError if the file is damaged or of another version, or the split is empty; UsageError if images
        should be fresh and the kind has a limited number of them.
        """
        if isinstance(source, Recipe):
            systems = draw_systems(source)
            recipe = source.with_systems(systems)
            self.digest = recipe.digest()
        else:
            portable = read_portable(source)
            systems, self.digest = portable.systems, portable.digest
            recipe = parse_recipe(portable.recipe, portable.recipe_digest, str(source))
            check_systems(recipe, systems, source)
            recipe.family.prepare(recipe.params, recipe.classes, no_progress)
        self.recipe, self.split, self.fresh, self._systems = recipe, split, fresh, systems
        self.classes, self.image_size, self.label_type = recipe.classes, recipe.size, recipe.family.label_type
        self.lengths = tuple(task.stop - task.first for task in shard_tasks(recipe) if task.split == split)
        self._samples = sum(self.lengths)
        self._first = 0 if split == "train" else recipe.n
        if not self.lengths:
            raise FractalError(f"the recipe of kind {recipe.kind} has no split {split!r}; make one with --val")
        if fresh and split != "train":
            raise UsageError(f"only the split 'train' can be rendered afresh, not {split!r}")
        if fresh and recipe.family.units_per_class(recipe.params) is not None:
            own = ", or make the recipe with --set stream=own" if hasattr(recipe.params, "stream") else ""
            raise UsageError(f"kind {recipe.kind} as set has a limited number of images; drop --fresh{own}")

    def __len__(self) -> int:
        """Return the number of samples, of one epoch if images are fresh."""
        return self._samples

    def read(self, index: int) -> Example:
        """Render sample ``index`` modulo the number of samples, n.

        If images are fresh, indices from n on are those of later epochs: sample i of epoch e has the index e n + i, and
        no image is ever drawn twice.

        Raises IndexError if the index is negative, or there are no later epochs.
        """
        epoch, place = divmod(operator.index(index), self._samples)
        if epoch < 0 or (epoch and not self.fresh):
            raise IndexError(f"sample index is {index}: expected 0 to {self._samples - 1}")
        image, label = render_sample(self.recipe, self._systems, self._first + place, epoch)
        return Example(sample_key(self._first + place), image, label if isinstance(label, int) else classes_of(label))


_PATIENCE = 8  # renders per image shown, after which rows of a multi-label kind may stay short


def draw_sheet(recipe: Recipe, per_class: int, tile: int) -> Image.Image:
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
