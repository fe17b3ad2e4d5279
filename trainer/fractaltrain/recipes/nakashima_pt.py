"""Pre-training of vision transformers on FractalDB: Nakashima et al., "Can Vision Transformers Learn without Natural
Images?", 2021: DeiT's, with another learning rate, no flips and no repeated augmentation.

    fractaltrain pt --shards shards/fractaldb --recipe nakashima

The learning rate is 3e-4 for every 512 images of the batch, so 6e-4 at 1024.

Not run at full size yet: the time it takes and the result to expect are still to be measured on a GPU.
"""

from dataclasses import replace

from fractaltrain.recipes import deit

RECIPE = replace(deit.RECIPE, name="nakashima", epochs=300, lr=6e-4, warmup_epochs=10, hflip=0.0, repeats=1)
