"""``fractaltrain pt``: shards, model and recipe meet in the loop."""

import torch

from fractalshards.manifest import load_manifest
from fractaltrain.data.shards import ShardSource
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
        manifest = load_manifest(choice.shards)
        image_size = choice.image_size or manifest.image_size or IMAGE_SIZE
        torch.manual_seed(choice.running.seed)
        job = Job(
            running=choice.running,
            model=create_model(choice.model, manifest.classes, image_size),
            training=ShardSource(manifest, "train"),
            window=choice.window,
            held_out=ShardSource(manifest, "val") if "val" in manifest.splits else None,
            image_size=image_size,
            settings={
                "task": "pt",
                "dataset": choice.shards.resolve().name,
                "dataset_digest": manifest.content_digest(),
                "model": choice.model,
                "classes": manifest.classes,
            },
        )
        train(job, world)
