"""A sample from its index: the pure function that a dataset is made of (law 1)."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fractalgen.color import Pixels
from fractalgen.kinds import find_kind
from fractalgen.plan import locate
from fractalgen.recipe import Recipe
from fractalshards.names import sample_key
from fractalshards.systems import Systems


def draw_systems(recipe: Recipe) -> tuple[npt.NDArray[np.float64], ...]:
    """Draw the system of every class of a recipe, each (maps, 2, 3) float64.

    Numpy may change its distributions between versions, so a build draws once and stores what it drew.
    """
    kind = find_kind(recipe.kind)
    return tuple(kind.draw_system(recipe.params, recipe.seed, label) for label in range(recipe.classes))


def render_sample(recipe: Recipe, systems: Systems, index: int) -> tuple[Pixels, int]:
    """Render sample ``index`` of a dataset.

    Args:
        recipe: what the dataset is.
        systems: one (maps, 2, 3) float64 array per class.
        index: in [0, n + val).

    Returns:
        The image, (size, size, 3) uint8 RGB, and its class index.

    Raises:
        IndexError: if the index is out of range.
    """
    place = locate(recipe, index)
    identity = (recipe.seed, place.split, place.label, place.replica)
    kind = find_kind(recipe.kind)
    image = kind.render(recipe.params, recipe.size, recipe.points, identity, systems[place.label])
    return image, place.label


def render_range(recipe: Recipe, systems: Systems, first: int, stop: int) -> Iterator[tuple[str, Pixels, int]]:
    """(key, image, class index) of the samples ``first`` to ``stop - 1``, as a shard takes them."""
    for index in range(first, stop):
        image, label = render_sample(recipe, systems, index)
        yield sample_key(index), image, label
