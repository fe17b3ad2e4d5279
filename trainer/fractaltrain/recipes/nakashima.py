"""Nakashima et al., "Can Vision Transformers Learn without Natural Images?", 2021.

    fractaltrain pt --shards shards/fractaldb --recipe nakashima
    fractaltrain ft --weights runs/fractaldb-deit_small_patch16_224-nakashima --data cifar10 --recipe nakashima

Pre-training is DeiT's without flips and repeated augmentation; the learning rate is 3e-4 per 512 images of the batch,
6e-4 at 1024. Fine-tuning on CIFAR uses SGD with 0.01 per 512 images (Touvron et al. 2021); evaluation takes the centre
crop.
"""

from dataclasses import replace

from fractaltrain.recipes import deit
from fractaltrain.recipes.recipe import IMAGENET_MEAN, IMAGENET_STD

PT = replace(deit.PT, name="nakashima", epochs=300, lr=6e-4, warmup_epochs=10, hflip=0.0, repeats=1)
FT = replace(
    PT,
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
