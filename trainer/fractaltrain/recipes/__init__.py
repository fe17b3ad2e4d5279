"""Recipes of training by name: for pre-training (``pt``) and for fine-tuning (``ft``)."""

from collections.abc import Mapping
from typing import Any

from fractaltrain.recipes import (
    anderson_ft,
    anderson_pt,
    anderson_scratch,
    deit,
    kataoka,
    nakashima_ft,
    nakashima_pt,
)
from fractaltrain.recipes.recipe import IMAGENET_MEAN, IMAGENET_STD

PRETRAINING = {recipe.name: recipe for recipe in (anderson_pt.RECIPE, deit.RECIPE, nakashima_pt.RECIPE, kataoka.RECIPE)}
FINETUNING = {recipe.name: recipe for recipe in (anderson_ft.RECIPE, anderson_scratch.RECIPE, nakashima_ft.RECIPE)}

_NATURAL = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
BY_KIND: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "anderson": {
        "fractaldb": {"crop": "random", "mean": 0.2, "std": 0.5},
        **{kind: {"crop": "resized", "hflip": 0.5, **_NATURAL} for kind in ("imagenet", "imagefolder")},
    },
    "deit": dict.fromkeys(("imagenet", "imagefolder"), _NATURAL),
}
"""What a recipe for pre-training does otherwise with datasets of a kind: recipe, kind, figure, value."""
