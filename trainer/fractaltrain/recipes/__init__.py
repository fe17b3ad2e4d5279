"""Training recipes by name, one module per paper. None has been run at full size yet.

``PT_RECIPES`` are for pre-training, ``FT_RECIPES`` for fine-tuning and training from scratch.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fractaltrain.recipes import anderson, deit, fdsl, kataoka, nakashima, onepfrac, rcdb
from fractaltrain.recipes.recipe import TrainRecipe

PT_RECIPES: Mapping[str, TrainRecipe] = {
    recipe.name: recipe
    for recipe in (anderson.PT, deit.PT, nakashima.PT, kataoka.PT, rcdb.PT, rcdb.PT_21K, onepfrac.PT)
}
FT_RECIPES: Mapping[str, TrainRecipe] = {
    recipe.name: recipe for recipe in (anderson.FT, anderson.FT_SCRATCH, nakashima.FT, fdsl.FT, fdsl.FT_IMAGENET)
}
_PT_FOR_DATASETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "anderson": anderson.PT_FOR_DATASETS,
    "deit": deit.PT_FOR_DATASETS,
}


def for_dataset(recipe: TrainRecipe, kind: str) -> TrainRecipe:
    """Return one of ``PT_RECIPES`` with the values that it has for a kind of dataset, e.g. ``fractaldb``."""
    return replace(recipe, **_PT_FOR_DATASETS.get(recipe.name, {}).get(kind, {}))


def dataset_fields(recipe: str) -> frozenset[str]:
    """Return the fields of a pre-training recipe whose values depend on the kind of the dataset."""
    return frozenset(field for values in _PT_FOR_DATASETS.get(recipe, {}).values() for field in values)
