"""Fine-tuning of a DeiT on CIFAR as usual, with SGD: Touvron et al. 2021, Nakashima et al. 2021.

    fractaltrain ft --weights runs/fractaldb-deit_small_patch16_224-nakashima --data cifar10 --recipe nakashima

The learning rate is 0.01 for every 512 images of the batch. Of held-out images the middle is seen.

Not run at full size yet: the time it takes and the result to expect are still to be measured on a GPU.
"""

from dataclasses import replace

from fractaltrain.recipes import nakashima_pt
from fractaltrain.recipes.recipe import IMAGENET_MEAN, IMAGENET_STD

RECIPE = replace(
    nakashima_pt.RECIPE,
    epochs=150,
    batch_size=512,
    lr=0.01,
    weight_decay=1e-4,
    optimizer="sgd",
    momentum=0.9,
    erasing=0.0,
    drop_path=0.0,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)
