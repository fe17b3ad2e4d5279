"""Datasets that are rendered while they are trained on: the only place where the trainer reaches the generator."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from fractalshards.manifest import TRAINING
from fractaltrain.data.source import Splits

if TYPE_CHECKING:
    from fractalgen import render
    from fractalgen.recipe import Recipe


RecipeOrPath: TypeAlias = "str | os.PathLike[str] | Recipe"
RenderedSplit: TypeAlias = "render.RenderedSplit"


def open_rendered(recipe: RecipeOrPath, split: str = TRAINING, fresh: bool = False) -> RenderedSplit:
    """Open a split of the dataset that a recipe or the file of a portable recipe describes.

    Raises FractalError as ``fractalgen.render.RenderedSplit`` does.
    """
    import fractalgen.render  # loads numba

    source = Path(recipe) if isinstance(recipe, str | os.PathLike) else recipe
    rendered = fractalgen.render.RenderedSplit(source, split, fresh)
    rendered.read(0)  # compiles the kernels, if need be, before every loader worker does it for itself
    return rendered


def open_rendered_splits(path: Path, fresh: bool) -> Splits[RenderedSplit]:
    """Open the splits of a portable recipe: ``train``, and ``val`` if it has one, which is never fresh.

    Raises FractalError as ``fractalgen.render.RenderedSplit`` does.
    """
    train = open_rendered(path, TRAINING, fresh)
    val = open_rendered(path, "val") if train.recipe.val else None
    return Splits(train, val, train.digest, train.image_size, train.label_type == "multi", train.recipe.to_json())
