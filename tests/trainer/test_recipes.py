"""Published hyperparameters, changes to them, and the check of the batch size."""

import re
from dataclasses import asdict, replace
from itertools import product

import pytest

from fractalshards.errors import UsageError
from fractaltrain.recipes import FT_RECIPES, PT_RECIPES, for_dataset
from fractaltrain.recipes.recipe import change, scale_lr
from fractaltrain.stream.order import check_batch

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = (0.5, 0.5, 0.5)

OFF = {
    "undecayed": "norms", "optimizer": "sgd", "momentum": 0.9, "schedule": "onecycle", "head_lr_factor": 1,
    "head_weight_decay": None, "pct_start": 0.3, "div_factor": 25, "final_div_factor": 1e4, "base_momentum": 0.85,
    "max_momentum": 0.95, "warmup_epochs": 0, "warmup_steps": 0, "warmup_lr": 1e-6, "min_lr": 1e-5,
    "milestones": (30, 60), "gamma": 0.1, "clip_grad": None, "augment": "none", "crop": "none", "crop_scale": (0.08, 1),
    "hflip": 0, "vflip": 0, "randaugment": 0, "color_jitter": 0, "erasing": 0, "mixup": 0, "cutmix": 0,
    "label_smoothing": 0, "drop_path": 0, "ema": 0, "repeats": 1, "passes": 1, "mean": (0, 0, 0), "std": (1, 1, 1),
}  # fmt: skip
ANDERSON_FT = {
    "epochs": 150, "batch_size": 64, "pct_start": 0.1, "augment": "affine", "hflip": 0.5, "mean": HALF, "std": HALF,
}  # fmt: skip
DEIT = {
    "undecayed": "vectors", "schedule": "cosine", "crop": "resized", "randaugment": 9, "color_jitter": 0.3,
    "mixup": 0.8, "cutmix": 1, "label_smoothing": 0.1,
}  # fmt: skip
DEIT_PT = {
    **DEIT, "batch_size": 1024, "weight_decay": 0.05, "optimizer": "adamw", "erasing": 0.25, "drop_path": 0.1,
    "mean": HALF, "std": HALF,
}  # fmt: skip
FDSL = {
    **DEIT, **IMAGENET, "color_jitter": 0, "lr": 1e-3, "weight_decay": 0.05, "optimizer": "adamw", "erasing": 0.25,
    "drop_path": 0.1, "warmup_epochs": 5,
}  # fmt: skip
PUBLISHED = {
    "pt rcdb": {**FDSL, "epochs": 300, "batch_size": 256, "repeats": 3},
    "pt visualatom": {
        **FDSL, "epochs": 90, "batch_size": 8192, "repeats": 3, "warmup_epochs": 0, "warmup_steps": 5000,
    },
    "pt onepfrac": {
        **FDSL, "epochs": 240, "passes": 256, "batch_size": 256, "lr": 5e-4, "min_lr": 5e-6, "warmup_lr": 5e-7,
        "warmup_epochs": 0, "warmup_steps": 15, "erasing": 0.5, "hflip": 0.5, "vflip": 0.5, "mean": HALF, "std": HALF,
    },
    "ft fdsl": {
        **FDSL, "epochs": 1000, "batch_size": 768, "lr": 0.015, "min_lr": 1.5e-5, "warmup_lr": 1.5e-6,
        "warmup_epochs": 10, "weight_decay": 1e-4, "optimizer": "sgd", "hflip": 0.5,
    },
    "ft fdsl-imagenet": {**FDSL, "epochs": 300, "batch_size": 1024, "hflip": 0.5},
    "pt anderson": {
        "epochs": 90, "batch_size": 64, "lr": 0.1, "weight_decay": 1e-4, "pct_start": 0, "final_div_factor": 1e3,
    },
    "pt deit": {**DEIT_PT, "epochs": 90, "lr": 1e-3, "warmup_epochs": 5, "hflip": 0.5, "repeats": 3},
    "pt nakashima": {**DEIT_PT, "epochs": 300, "lr": 6e-4, "warmup_epochs": 10},
    "pt kataoka": {
        "epochs": 90, "batch_size": 256, "lr": 0.1, "weight_decay": 1e-4, "undecayed": "none", "schedule": "step",
        "crop": "random", "mean": (0.2,) * 3, "std": HALF,
    },
    "ft anderson": {
        **ANDERSON_FT, "lr": 0.015, "weight_decay": 5e-5, "head_lr_factor": 10, "head_weight_decay": 1e-4,
    },
    "ft anderson-scratch": {**ANDERSON_FT, "lr": 0.15, "weight_decay": 1e-4},
    "ft nakashima": {
        **DEIT, **IMAGENET, "epochs": 150, "batch_size": 512, "lr": 0.01, "weight_decay": 1e-4, "warmup_epochs": 10,
    },
}  # fmt: skip
"""Values of the papers, by task and recipe; values that a recipe does not name here are those of ``OFF``."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_values(name):
    task, recipe = name.split()
    found = {"pt": PT_RECIPES, "ft": FT_RECIPES}[task][recipe]
    assert asdict(found) == {**OFF, **PUBLISHED[name], "name": recipe}


def test_every_recipe_is_in_the_table():
    assert {*(f"pt {name}" for name in PT_RECIPES), *(f"ft {name}" for name in FT_RECIPES)} == set(PUBLISHED)


PHOTOGRAPHS = {"crop": "resized", "hflip": 0.5, **IMAGENET}


@pytest.mark.parametrize(
    ("recipe", "kind", "values"),
    [
        ("anderson", "fractaldb", {"crop": "random", "mean": (0.2,) * 3, "std": HALF}),
        ("anderson", "imagenet", PHOTOGRAPHS),
        ("anderson", "imagefolder", PHOTOGRAPHS),
        ("anderson", "single", {}),
        ("anderson", "visualatom", {"crop": "resized"}),
        ("anderson", "rcdb", {"crop": "resized"}),
        ("anderson", "onepfrac", {"crop": "resized"}),
        ("deit", "visualatom", {}),
        ("deit", "imagenet", IMAGENET),
        ("deit", "imagefolder", IMAGENET),
        ("deit", "fractaldb", {}),
        ("nakashima", "imagenet", {}),
    ],
)
def test_for_dataset(recipe, kind, values):
    assert for_dataset(PT_RECIPES[recipe], kind) == replace(PT_RECIPES[recipe], **values)


def test_change():
    changes = {"epochs": "3", "lr": "1e-2", "mean": "0.2", "std": "0.1,0.2,0.3", "augment": "none"}
    recipe = change(FT_RECIPES["anderson"], {**changes, "head_weight_decay": "none"})
    assert (recipe.epochs, recipe.lr, recipe.augment, recipe.head_weight_decay) == (3, 0.01, "none", None)
    assert (recipe.mean, recipe.std) == ((0.2, 0.2, 0.2), (0.1, 0.2, 0.3))
    assert recipe.hflip == 0.5


@pytest.mark.parametrize(
    "change_",
    [
        *("epoch=3", "name=x", "epochs=1.5", "epochs=0", "lr=fast", "lr=-1", "lr=nan", "weight_decay=inf"),
        *("head_weight_decay=few", "head_weight_decay=-1", "hflip=2", "mean=1,2", "std=0", "clip_grad=0"),
        *("crop=middle", "crop_scale=1,0.5", "crop_scale=0,1", "randaugment=11", "label_smoothing=-0.1", "mixup=-1"),
        *("repeats=0", "schedule=linear", "ema=1", "milestones=60,30", "optimizer=adam", "augment=mixup"),
    ],
)
def test_change_refuses_what_does_not_fit(change_):
    name, _, text = change_.partition("=")
    with pytest.raises(UsageError, match=name):
        change(FT_RECIPES["anderson"], {name: text})


def test_warmup_longer_than_training_is_refused():
    with pytest.raises(UsageError, match="warmup_epochs"):
        change(PT_RECIPES["deit"], {"epochs": "4"})


def test_scale_lr():
    recipe = change(PT_RECIPES["anderson"], {"batch_size": "512"})
    assert recipe.lr == 0.1
    scaled = scale_lr(recipe, published_batch_size=64)
    assert (scaled.lr, scaled.warmup_lr, scaled.min_lr) == pytest.approx((0.8, 8e-6, 8e-5))


@pytest.mark.parametrize("recipe", [PT_RECIPES["anderson"], PT_RECIPES["deit"]], ids=["plain", "mixing"])
def test_check_batch_suggests_sizes_that_work(recipe):
    """Following the advice leads to a valid batch, whatever the batch size, processes and samples."""
    ended = set()
    for batch, processes, samples in product(range(1, 13), range(1, 5), range(1, 13)):
        size, message = batch, ""
        for _ in range(4):
            try:
                check_batch(replace(recipe, batch_size=size), processes, 1, samples)
                ended.add("valid")
                break
            except UsageError as error:
                message = str(error)
            if not (advised := re.search(r"--batch-size (?:to )?(\d+)", message)):
                assert samples < processes * (2 if recipe.mixes else 1)
                ended.add("too few samples")
                break
            size = int(advised[1])
        else:
            raise AssertionError(f"{batch}, {processes}, {samples}: {message}")
    assert ended == {"valid", "too few samples"}


def test_check_batch_with_accumulation():
    recipe = replace(PT_RECIPES["anderson"], batch_size=12)
    check_batch(recipe, 2, 3, 12)
    with pytest.raises(UsageError, match="--batch-size to 6"):
        check_batch(recipe, 2, 3, 11)
    with pytest.raises(UsageError, match=r"--accumulate 3.*--batch-size 6"):
        check_batch(replace(recipe, batch_size=8), 2, 3)
