"""Pre-training of Anderson & Farrell, "Improving Fractal Pre-training", WACV 2022.

    fractaltrain pt --shards shards/single --model resnet50

The paper trained on two processes with 32 images each. Images enter as [0, 1], neither normalised nor augmented,
because that is what the published code does. The learning rate never rises: with pct_start 0, torch's OneCycleLR
puts step 0 already one step down the cosine, at lr * (1 + cos(pi / steps)) / 2, as it did in the published runs.
FractalDB is seen through random crops, normalised as its authors did; ImageNet as usual (``recipes.BY_KIND``).

Not run at full size yet: the time it takes and the result to expect are still to be measured on a GPU.
"""

from fractaltrain.recipes.recipe import Recipe

RECIPE = Recipe(
    name="anderson",
    epochs=90,
    batch_size=64,
    lr=0.1,
    weight_decay=1e-4,
    pct_start=0.0,
    final_div_factor=1e3,
)
