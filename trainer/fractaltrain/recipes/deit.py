"""DeiT: Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021.

    fractaltrain pt --shards shards/single --recipe deit

The learning rate is 5e-4 per 512 images of the batch: 1e-3 at 1024. The schedule advances with every step, once per
epoch in the published code. RandAugment is rand-m9-mstd0.5-inc1; colour jitter applies only where RandAugment is off.
"""

from fractaltrain.recipes.recipe import IMAGENET_MEAN, IMAGENET_STD, TrainRecipe

PT = TrainRecipe(
    name="deit",
    epochs=90,
    batch_size=1024,
    lr=1e-3,
    weight_decay=0.05,
    undecayed="vectors",
    optimizer="adamw",
    schedule="cosine",
    warmup_epochs=5,
    warmup_lr=1e-6,
    min_lr=1e-5,
    crop="resized",
    crop_scale=(0.08, 1.0),
    hflip=0.5,
    randaugment=9.0,
    color_jitter=0.3,
    erasing=0.25,
    mixup=0.8,
    cutmix=1.0,
    label_smoothing=0.1,
    drop_path=0.1,
    repeats=3,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
_PHOTOGRAPHS = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
PT_FOR_DATASETS = {"imagenet": _PHOTOGRAPHS, "imagefolder": _PHOTOGRAPHS}
