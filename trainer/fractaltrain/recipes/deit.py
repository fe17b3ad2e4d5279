"""Pre-training of DeiT: Touvron et al., "Training data-efficient image transformers & distillation through
attention", ICML 2021.

    fractaltrain pt --shards shards/single --recipe deit

The learning rate is 5e-4 for every 512 images of the batch, so 1e-3 at 1024; the schedule moves with every step, where
the published code sets it once per epoch. RandAugment is rand-m9-mstd0.5-inc1; color jitter would only act without it.

Not run at full size yet: the time it takes and the result to expect are still to be measured on a GPU.
"""

from fractaltrain.recipes.recipe import Recipe

RECIPE = Recipe(
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
