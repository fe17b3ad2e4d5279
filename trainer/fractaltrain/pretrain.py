"""``fractaltrain pt``: shards, model and recipe meet in the loop."""

import torch

from fractaltrain.data.dataset import open_dataset
from fractaltrain.models import IMAGE_SIZE, create_model
from fractaltrain.settings import Pretraining
from fractaltrain.train import Job, train
from fractaltrain.world import join_world


def pretrain(choice: Pretraining) -> None:
    """Pre-train on the ``train`` split, in each process of the world; evaluate on ``val`` where there is one.

    Raises:
        FractalError: as ``train`` does, or if the dataset is missing or damaged, or the model is not known.
    """
    with join_world() as world:
        dataset = open_dataset(choice.shards, world)
        stored = dataset.image_size if choice.running.recipe.crop == "none" else None  # a crop has the usual size
        image_size = choice.image_size or stored or IMAGE_SIZE
        torch.manual_seed(choice.running.seed)
        job = Job(
            running=choice.running,
            model=create_model(choice.model, dataset.classes, image_size),
            training=dataset.training,
            window=choice.window,
            held_out=dataset.held_out,
            image_size=image_size,
            settings={
                "task": "pt",
                "dataset": choice.shards.resolve().name,
                "dataset_digest": dataset.digest,
                "model": choice.model,
                "classes": dataset.classes,
            },
        )
        train(job, world)
