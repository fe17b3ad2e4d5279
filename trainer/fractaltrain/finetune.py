"""``fractaltrain ft``: weights of a pre-training (or none), real images and recipe meet in the loop."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError
from fractalshards.human import human_count
from fractaltrain.checkpoint import load_checkpoint, model_weights
from fractaltrain.data.finetuning import open_data
from fractaltrain.models import IMAGE_SIZE, create_model
from fractaltrain.run_folder import trained_model
from fractaltrain.settings import Finetuning
from fractaltrain.train import Job, train
from fractaltrain.weights import load_backbone
from fractaltrain.world import join_world

_WINDOW = 1  # the images are not in shards


@dataclass(frozen=True)
class Pretrained:
    """A run to start from: how far it came, its model's state dict, and the sha256 of the checkpoint they are from.

    ``passed_over`` says what is wrong with newer checkpoints, a line each.
    """

    model: str
    image_size: int
    epochs: int
    weights: Mapping[str, torch.Tensor]
    sha256: str
    passed_over: tuple[str, ...]


def finetune(choice: Finetuning) -> None:
    """Fine-tune in each process of the world, with a new classifier; evaluate on the held-out images.

    What was loaded and what was not is printed.

    Raises:
        FractalError: as ``train`` does, or if weights or images are missing, damaged or do not fit.
    """
    with join_world() as world:
        pretrained = None if choice.weights is None else load_pretrained(choice.weights)
        name = pretrained.model if pretrained else choice.model
        image_size = choice.image_size or (pretrained.image_size if pretrained else IMAGE_SIZE)
        with world.main_first():  # it may download
            training, held_out = open_data(choice.data)
        torch.manual_seed(choice.running.seed)
        model = create_model(name, training.classes, image_size, choice.running.recipe.drop_path)
        if pretrained:
            report = load_backbone(model, pretrained.weights, str(choice.weights))
            if world.main:
                for problem in pretrained.passed_over:
                    print(f"{problem}; taking the one before", flush=True)
                epochs = human_count(pretrained.epochs, "epoch")
                print(f"weights of {choice.weights} after {epochs}: {report}", flush=True)
        job = Job(
            running=choice.running,
            model=model,
            training=training,
            window=_WINDOW,
            held_out=held_out,
            image_size=image_size,
            settings={
                "task": "ft",
                "data": choice.data.name,
                "per_class": choice.data.per_class,
                "subset_seed": choice.data.subset_seed,
                "model": name,
                "classes": training.classes,
                "weights": pretrained.sha256 if pretrained else None,
            },
        )
        train(job, world)


def load_pretrained(run: Path) -> Pretrained:
    """Read the newest sound checkpoint of a run.

    Raises:
        FractalError: if the folder holds no run, or none with a sound checkpoint.
    """
    model, image_size = trained_model(run)
    checkpoint = load_checkpoint(run)
    if checkpoint is None:
        raise FractalError(f"{run}: no checkpoint yet; let its training finish an epoch first")
    epochs, weights, digest = checkpoint.position.epoch, model_weights(checkpoint), sha256_file(checkpoint.path)
    return Pretrained(model, image_size, epochs, weights, digest, checkpoint.passed_over)
