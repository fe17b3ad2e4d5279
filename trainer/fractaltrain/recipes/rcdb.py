"""Contours: Kataoka et al., CVPR 2022 (RCDB, ExFractalDB), and Takashima et al., CVPR 2023 (VisualAtom).

    fractaltrain pt --shards shards/rcdb --model deit_tiny_patch16_224 --recipe rcdb
    fractaltrain pt --shards shards/visualatom --model deit_tiny_patch16_224 --recipe rcdb
    fractaltrain pt --shards shards/visualatom-21k --model deit_base_patch16_224 --recipe visualatom --amp bf16

Figures of the published scripts (masora1030/CVPR2022-Pretrained-ViT-PyTorch, and pretrain.sh of
masora1030/CVPR2023-FDSL-on-VisualAtom). ``rcdb`` trains on sets of 1,000 classes, ``visualatom`` on 21,000. RandAugment
is rand-m9-mstd0.5-inc1, repeated augmentation takes every image three times, and nothing is mirrored.

Published: ImageNet-1k after fine-tuning with ``fdsl-imagenet``: ViT-T of VisualAtom-1k 74.2 %, ViT-B of ExFractalDB-21k
82.7 % and of VisualAtom-21k 83.7 %. Neither has been run here.
"""

from dataclasses import replace

from fractaltrain.recipes import deit
from fractaltrain.recipes.recipe import IMAGENET_MEAN, IMAGENET_STD

PT = replace(
    deit.PT,
    name="rcdb",
    epochs=300,
    batch_size=256,
    hflip=0.0,
    color_jitter=0.0,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
)
PT_21K = replace(PT, name="visualatom", epochs=90, batch_size=8192, warmup_epochs=0, warmup_steps=5000)
