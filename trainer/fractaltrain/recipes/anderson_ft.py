"""Fine-tuning of Anderson & Farrell, "Improving Fractal Pre-training", WACV 2022.

    fractaltrain ft --weights runs/single-resnet50-anderson --data cifar100

The published batch is 16; 64 is ours, with the same learning rate. The new classifier learns ten times faster.

Not run at full size yet: the time it takes and the result to expect are still to be measured on a GPU.
"""

from fractaltrain.recipes.recipe import Recipe

RECIPE = Recipe(
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
