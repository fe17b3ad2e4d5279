"""Anderson & Farrell, "Improving Fractal Pre-training", WACV 2022.

    fractaltrain pt --shards shards/single --model resnet50
    fractaltrain ft --weights runs/single-resnet50-anderson --data cifar100
    fractaltrain ft --weights none --model resnet50 --data cifar100

Pre-training: the paper used two processes with 32 images each. Images are scaled to [0, 1] and neither normalised nor
augmented, as in the published code. With ``pct_start`` 0 the learning rate never rises: torch's OneCycleLR begins one
step down the cosine, at lr * (1 + cos(pi / steps)) / 2, as in the published runs. FractalDB is trained on random crops
with its authors' normalisation, VisualAtom, RCDB and 1p-frac on random resized crops, as their authors do, ImageNet and
image folders as is usual for photographs.

Fine-tuning: the published batch size is 16; we use 64 with the same learning rate. The learning rate of the new
classifier is ten times higher. Training from scratch is the baseline, with one higher learning rate for all parameters.
"""

from dataclasses import replace
from typing import Any

from fractaltrain.recipes.recipe import IMAGENET_MEAN, IMAGENET_STD, TrainRecipe

PT = TrainRecipe(
    name="anderson",
    epochs=90,
    batch_size=64,
    lr=0.1,
    weight_decay=1e-4,
    pct_start=0.0,
    final_div_factor=1e3,
)
_PHOTOGRAPHS: dict[str, Any] = {"crop": "resized", "hflip": 0.5, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
PT_FOR_DATASETS: dict[str, dict[str, Any]] = {
    "fractaldb": {"crop": "random", "mean": (0.2, 0.2, 0.2), "std": (0.5, 0.5, 0.5)},
    "imagenet": _PHOTOGRAPHS,
    "imagefolder": _PHOTOGRAPHS,
    **{kind: {"crop": "resized"} for kind in ("visualatom", "rcdb", "onepfrac")},
}

FT = TrainRecipe(
    name="anderson",
    epochs=150,
    batch_size=64,
    lr=0.015,
    weight_decay=5e-5,
    head_lr_factor=10.0,
    head_weight_decay=1e-4,
    pct_start=0.1,
    final_div_factor=1e4,
    augment="affine",
    hflip=0.5,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
FT_SCRATCH = replace(
    FT, name="anderson-scratch", lr=0.15, weight_decay=1e-4, head_lr_factor=1.0, head_weight_decay=None
)
