"""1p-frac, Nakamura et al., ECCV 2024, and OFDB, Nakamura et al., ICCV 2023: a thousand images.

    fractaltrain pt --shards shards/onepfrac --memory --model deit_tiny_patch16_224 --recipe onepfrac
    fractaltrain pt --shards shards/ofdb --memory --model deit_tiny_patch16_224 --recipe onepfrac

Figures of SUPER-TADORY/1p-frac: 240,000 steps of 256 images, published as 80,000 epochs of three whole batches; here
240 epochs of 256 passes over the images, which leave none out. The learning rate is 1e-3 per 512 images. The warm-up of
the published code ends after 5 of its epochs, 15 steps, so its 5,000 warm-up steps are never reached.

Published: CIFAR-100 with ViT-T after fine-tuning with ``fdsl``: 1p-frac 84.2 %, OFDB-1k 84.0 %, FractalDB-1k 81.6 %,
ImageNet-1k 85.5 %, from scratch 64.2 %. It has not been run here.
"""

from dataclasses import replace

from fractaltrain.recipes import deit

PT = replace(
    deit.PT,
    name="onepfrac",
    epochs=240,
    passes=256,
    batch_size=256,
    lr=5e-4,
    min_lr=5e-6,
    warmup_lr=5e-7,
    warmup_epochs=0,
    warmup_steps=15,
    vflip=0.5,
    color_jitter=0.0,
    erasing=0.5,
    repeats=1,
)
