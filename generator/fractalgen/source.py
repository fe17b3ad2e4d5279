"""Samples that are rendered when they are read, for training without stored images."""

import operator
from pathlib import Path

from fractalgen.plan import shard_tasks
from fractalgen.recipe import Recipe, parse_recipe
from fractalgen.render import check_systems, draw_systems, render_sample
from fractalshards.errors import FractalError, UsageError
from fractalshards.manifest import sample_key
from fractalshards.reader import Example
from fractalshards.recipe_file import read_portable
from fractalshards.sample import classes_of
from fractalshards.systems import Systems
from fractalshards.workers import no_progress


class RenderedSplit:
    """One split, ``train`` or ``val``, of a dataset that need not exist: sample i is what its shards would hold there.

    Attributes:
        class_names: empty; the classes have no names.
        digest: identifies the dataset: its content digest if it was ever built, else the digest of its recipe.
        lengths: samples per shard that a build would write.
        fresh: every epoch shows new images; see ``read``.
    """

    class_names: tuple[str, ...] = ()

    def __init__(
        self, recipe: Recipe, systems: Systems, split: str, fresh: bool = False, digest: str | None = None
    ) -> None:
        """Create the split; see ``open_recipe``. ``digest`` is that of the dataset if it was built."""
        if recipe.with_systems(systems) != recipe:
            raise FractalError(f"kind {recipe.kind}: the systems are not those of the recipe; make the recipe again")
        check_systems(recipe, systems, f"kind {recipe.kind}")
        recipe.family.prepare(recipe.params, recipe.classes, no_progress)
        self.recipe, self.split, self.fresh = recipe, split, fresh
        self.classes, self.image_size, self.label_type = recipe.classes, recipe.size, recipe.family.label_type
        self.digest = digest or recipe.digest()
        self.lengths = tuple(task.stop - task.first for task in shard_tasks(recipe) if task.split == split)
        if not self.lengths:
            raise FractalError(f"the recipe of kind {recipe.kind} has no split {split!r}; make one with --val")
        if fresh and split != "train":
            raise UsageError(f"only the split 'train' can be rendered afresh, not {split!r}")
        if fresh and recipe.family.units_per_class(recipe.params) is not None:
            own = ", or make the recipe with --set stream=own" if hasattr(recipe.params, "stream") else ""
            raise UsageError(
                f"kind {recipe.kind} with these parameters has a limited number of images; drop --fresh{own}"
            )
        self._systems = systems
        self._samples = sum(self.lengths)
        self._first = 0 if split == "train" else recipe.n

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


def open_recipe(source: Path | Recipe, split: str = "train", fresh: bool = False) -> RenderedSplit:
    """Open a split of the dataset that a recipe describes: a portable one, or one whose systems are drawn.

    Raises FractalError if the file is damaged or of another version, or the split is empty; UsageError if images should
    be fresh and the kind has a limited number of them.
    """
    if isinstance(source, Recipe):
        systems = draw_systems(source)
        return RenderedSplit(source.with_systems(systems), systems, split, fresh)
    portable = read_portable(source)
    recipe = parse_recipe(portable.recipe, portable.recipe_digest, str(source))
    return RenderedSplit(recipe, portable.systems, split, fresh, portable.digest)
