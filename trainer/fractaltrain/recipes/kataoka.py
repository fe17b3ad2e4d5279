"""Pre-training of CNNs on FractalDB: Kataoka et al., "Pre-training without Natural Images", ACCV 2020.

    fractaltrain pt --shards shards/fractaldb --model resnet50 --recipe kataoka

Training takes random crops of the 362 x 362 images. Weight decay applies to all parameters, norms and biases included.
"""

from fractaltrain.recipes.recipe import TrainRecipe

PT = TrainRecipe(
    name="kataoka",
    epochs=90,
    batch_size=256,
    lr=0.1,
    weight_decay=1e-4,
    undecayed="none",
    momentum=0.9,
    schedule="step",
    milestones=(30, 60),
    gamma=0.1,
    crop="random",
    mean=(0.2, 0.2, 0.2),
    std=(0.5, 0.5, 0.5),
)
