"""Anderson & Farrell's training without pre-training, for comparison.

    fractaltrain ft --weights none --model resnet50 --data cifar100

As their fine-tuning, but from random weights: a higher learning rate, and the classifier learns like the rest.

Not run at full size yet: the time it takes and the result to expect are still to be measured on a GPU.
"""

from dataclasses import replace

from fractaltrain.recipes import anderson_ft

RECIPE = replace(
    anderson_ft.RECIPE,
    name="anderson-scratch",
    lr=0.15,
    weight_decay=1e-4,
    head_lr_factor=1.0,
    head_weight_decay=None,
)
