"""``fractaltrain ft``: weights of a pre-training, timm's or none, real images and recipe meet in the loop."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fractalshards.console import is_quiet
from fractalshards.digest import sha256_file
from fractaltrain.checkpoint import describe_origin, model_weights, sound_checkpoint
from fractaltrain.config import WINDOW, Finetuning
from fractaltrain.data.images import open_data
from fractaltrain.distributed import World, join_world
from fractaltrain.models import IMAGE_SIZE, create_model, freeze_backbone, load_backbone, load_published
from fractaltrain.run_folder import trained_model
from fractaltrain.train import Job, train


@dataclass(frozen=True)
class Pretrained:
    """Weights to start from.

    Attributes:
        weights: state dict of ``model`` with any classifier.
        identity: tells them from others: sha256 of the checkpoint, or the name of published ones.
        where: what errors call them.
        origin: what people are told of them.
    """

    model: str
    image_size: int
    weights: Mapping[str, torch.Tensor]
    identity: str
    where: str
    origin: str


def finetune(choice: Finetuning) -> None:
    """Fine-tune in each process of the world, with a new classifier; evaluate on the held-out images.

    What was loaded and what was not is printed.

    Raises:
        FractalError: as ``train`` does, or if weights or images are missing, damaged or do not fit.
    """
    with join_world() as world:
        pretrained = load_pretrained(choice, world)
        name = pretrained.model if pretrained else choice.model
        image_size = choice.image_size or (pretrained.image_size if pretrained else IMAGE_SIZE)
        data = open_data(choice.data, world)
        classes = data.training.classes
        torch.manual_seed(choice.running.seed)
        model = create_model(name, classes, image_size, choice.running.recipe.drop_path)
        if pretrained:
            report = load_backbone(model, pretrained.weights, pretrained.where)
            _say(f"{pretrained.origin}: {report}", world)
        if choice.freeze:
            freeze_backbone(model)
            _say(f"backbone frozen: {_learning(model)}", world)
        job = Job(
            running=choice.running,
            model=model,
            training=data.training,
            window=WINDOW,
            held_out=data.held_out,
            image_size=image_size,
            settings={
                "task": "ft",
                "data": choice.data.name,
                "data_digest": data.digest,
                "per_class": choice.data.per_class,
                "subset_seed": choice.data.subset_seed,
                "model": name,
                "classes": classes,
                "class_names": data.class_names,
                "weights": pretrained.identity if pretrained else None,
                "freeze": choice.freeze,
            },
        )
        train(job, world)


def load_pretrained(choice: Finetuning, world: World) -> Pretrained | None:
    """The weights that a choice asks for, if any: the newest sound ones of a run, or timm's published ones.

    Raises:
        FractalError: if the folder holds no run, or none with a sound checkpoint; or timm's cannot be had.
    """
    if choice.weights is None:
        return None
    if choice.weights == "timm":
        image_size = choice.image_size or IMAGE_SIZE
        with world.main_first():  # it may download
            published = load_published(choice.model, image_size)
        where = f"timm's {published.name}"
        return Pretrained(choice.model, image_size, published.weights, f"timm:{published.name}", where,
                          f"published weights of {where}")  # fmt: skip
    return _of_run(choice.weights)


def _of_run(run: Path) -> Pretrained:
    model, image_size = trained_model(run)
    checkpoint = sound_checkpoint(run)
    return Pretrained(
        model=model,
        image_size=image_size,
        weights=model_weights(checkpoint),
        identity=sha256_file(checkpoint.path),
        where=str(run),
        origin=describe_origin(run, checkpoint.position, checkpoint.passed_over),
    )


def _say(text: str, world: World) -> None:
    if world.main and not is_quiet():
        print(text, flush=True)


def _learning(model: nn.Module) -> str:
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return f"only {', '.join(learning)} learn"
