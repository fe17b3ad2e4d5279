"""Datasets that are rendered while they are trained on: the only place where the trainer reaches the generator."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fractalshards.manifest import TRAINING

if TYPE_CHECKING:
    from fractalgen.recipe import Recipe
    from fractalgen.source import RenderedSplit


RecipeOrPath: TypeAlias = "str | os.PathLike[str] | Recipe"


def open_rendered(source: RecipeOrPath, split: str = TRAINING, fresh: bool = False) -> "RenderedSplit":
    """Open a split of the dataset that a recipe or the file of a portable recipe describes.

    Raises:
        FractalError: see ``fractalgen.source.open_recipe``.
    """
    from fractalgen.source import open_recipe  # loads numba

    return open_recipe(Path(source) if isinstance(source, str | os.PathLike) else source, split, fresh)
