"""Recipes of training by name: for pre-training (``pt``) and for fine-tuning (``ft``)."""

from fractaltrain.recipes import anderson_ft, anderson_pt, anderson_scratch

PRETRAINING = {recipe.name: recipe for recipe in (anderson_pt.RECIPE,)}
FINETUNING = {recipe.name: recipe for recipe in (anderson_ft.RECIPE, anderson_scratch.RECIPE)}
