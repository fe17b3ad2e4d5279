"""Fine-tuning in the papers of formula-driven supervised learning: RCDB, VisualAtom, OFDB, 1p-frac (2022 to 2024).

    fractaltrain ft --weights runs/onepfrac-deit_tiny_patch16_224-onepfrac --data cifar100 --recipe fdsl
    fractaltrain ft --weights runs/visualatom-deit_tiny_patch16_224-rcdb --data imagefolder:imagenet \\
      --recipe fdsl-imagenet

Figures of the scripts in the same repositories (``rcdb``, ``onepfrac``), and of CVPR2022's finetune.sh. ``fdsl`` is for
CIFAR and sets of its size, with 0.01 per 512 images of the batch; ``fdsl-imagenet`` is for ImageNet.

Published results are those of ``rcdb`` and ``onepfrac``. Neither has been run here.
"""

from dataclasses import replace

from fractaltrain.recipes import rcdb

FT_IMAGENET = replace(rcdb.PT, name="fdsl-imagenet", batch_size=1024, hflip=0.5, repeats=1)
FT = replace(
    FT_IMAGENET,
    name="fdsl",
    epochs=1000,
    batch_size=768,
    lr=0.015,
    min_lr=1.5e-5,
    warmup_lr=1.5e-6,
    warmup_epochs=10,
    weight_decay=1e-4,
    optimizer="sgd",
)
