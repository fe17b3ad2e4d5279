"""``fractaltrain ft``: weights of a pre-training (or none), real images and recipe meet in the loop."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError
from fractaltrain.checkpoint import FILE, load_checkpoint
from fractaltrain.data.finetuning import open_data
from fractaltrain.models import create_model
from fractaltrain.run_folder import read_settings
from fractaltrain.settings import Finetuning
from fractaltrain.train import Job, train
from fractaltrain.weights import load_backbone
from fractaltrain.world import World, join_world

_WINDOW = 1  # the images are not in shards


def finetune(choice: Finetuning) -> None:
    """Fine-tune in each process of the world, with a new classifier; evaluate on the held-out images.

    Raises:
        FractalError: as ``train`` does, or if weights or images are missing, damaged or do not fit.
    """
    with join_world() as world:
        start = starting_point(choice)
        with world.main_first():  # it may download
            training, held_out = open_data(choice.data)
        torch.manual_seed(choice.running.seed)
        model = create_model(start["model"], training.classes, start["image_size"])
        if choice.weights is not None:
            load_weights(model, choice.weights, world)
        job = Job(
            running=choice.running,
            model=model,
            training=training,
            window=_WINDOW,
            held_out=held_out,
            image_size=start["image_size"],
            settings={
                "task": "ft",
                "data": choice.data.name,
                "per_class": choice.data.per_class,
                "subset_seed": choice.data.subset_seed,
                "model": start["model"],
                "classes": training.classes,
                "weights": start["weights"],
            },
        )
        train(job, world)


def starting_point(choice: Finetuning) -> dict[str, Any]:
    """Model, image size and the digest of the weights (None without) that a fine-tuning starts from.

    Raises:
        FractalError: if the weights are not the folder of a run with a checkpoint.
    """
    if choice.weights is None:
        assert choice.model is not None
        return {"model": choice.model, "image_size": choice.image_size or 224, "weights": None}
    settings = read_settings(choice.weights)
    if not (choice.weights / FILE).is_file():
        raise FractalError(f"{choice.weights}: no {FILE}; let its training finish an epoch first")
    return {
        "model": settings["model"],
        "image_size": choice.image_size or settings["image_size"],
        "weights": sha256_file(choice.weights / FILE),
    }


def load_weights(model: nn.Module, run: Path, world: World) -> None:
    """Load a run's weights, all but the classifier, and print what was loaded and what was not."""
    saved = load_checkpoint(run)
    assert saved is not None
    position, state = saved
    report = load_backbone(model, state["model"], str(run))
    if world.main:
        print(f"weights of {run} after {position.epoch} epochs: {report}", flush=True)
