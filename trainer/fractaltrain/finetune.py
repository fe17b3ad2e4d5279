"""``fractaltrain ft``: fine-tune a model on real images, from a pre-training, timm's weights or random ones."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fractaltrain.checkpoint import load_run
from fractaltrain.config import DatasetConfig, ModelArgument, ModelConfig, TrainConfig
from fractaltrain.data.images import open_data
from fractaltrain.distributed import World, join_world
from fractaltrain.models import IMAGE_SIZE, create_model, freeze_backbone, load_backbone, load_published
from fractaltrain.run_folder import Training
from fractaltrain.train import train


class Pretrained(NamedTuple):
    """Weights to start from."""

    model: str
    arguments: Mapping[str, ModelArgument]  # further arguments of ``timm.create_model``
    image_size: int  # side in pixels of the images they were trained on
    weights: Mapping[str, torch.Tensor]  # with any classifier
    identity: str  # sha256 of the checkpoint, or the name of timm's weights
    source: str  # the folder of the run, or the name of timm's weights
    origin: str  # a line that says where they come from
    training: Mapping[str, Any]  # how the run was trained, as run.json says; empty for timm's


def finetune(config: TrainConfig) -> None:
    """Fine-tune with a new classifier; evaluate on the val split. Runs in every rank.

    Raises FractalError as ``train`` does, or if weights or images are missing or damaged, or do not fit.
    """
    images, recipe = config.data, config.recipe
    assert not isinstance(images, DatasetConfig)
    with join_world() as world:
        pretrained = load_pretrained(config.model, world)
        name = pretrained.model if pretrained else config.model.name
        arguments = pretrained.arguments if pretrained else dict(config.model.arguments)
        image_size = config.model.image_size or (pretrained.image_size if pretrained else IMAGE_SIZE)
        data = open_data(images, world)
        classes = data.train.classes
        torch.manual_seed(config.run.seed)
        model = create_model(name, classes, image_size, recipe.drop_path, arguments)
        messages = []
        if pretrained:
            messages.append(f"{pretrained.origin}: {load_backbone(model, pretrained.weights, pretrained.source)}")
        if config.model.freeze:
            freeze_backbone(model)
            trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
            messages.append(f"backbone frozen: training only {', '.join(trained)}")
        if world.main and not config.run.quiet:
            print(*messages, sep="\n", end="\n" if messages else "", flush=True)
        facts = {
            "task": "ft",
            "data": images.shown,
            "data_digest": data.digest,
            "per_class": images.per_class,
            "subset_seed": images.subset_seed,
            "model": name,
            **({"model_args": arguments} if arguments else {}),
            "classes": classes,
            "class_names": data.train.class_names,
            "weights": pretrained.identity if pretrained else None,
            **({"pretraining": pretrained.training} if pretrained and pretrained.training else {}),
            "freeze": config.model.freeze,
        }
        train(config, model, data, image_size, facts, world)


def load_pretrained(model: ModelConfig, world: World) -> Pretrained | None:
    """Load the weights to start from, if any: the newest ones of a run, or timm's published ones.

    Raises FractalError if the folder holds no run or no readable checkpoint, or timm's weights cannot be fetched.
    """
    if model.weights is None:
        return None
    if isinstance(model.weights, Path):
        run = load_run(model.weights)
        settings, folder = run.settings, str(model.weights)
        architecture = settings.model, settings.model_args, settings.image_size
        training = {field.name: asdict(settings)[field.name] for field in fields(Training)}
        return Pretrained(*architecture, run.checkpoint.weights, run.sha256, folder, run.origin, training)
    image_size = model.image_size or IMAGE_SIZE
    with world.main_first():  # rank 0 may download
        name, weights = load_published(model.name, image_size)
    architecture = model.name, dict(model.arguments), image_size
    return Pretrained(
        *architecture, weights, f"timm:{name}", f"timm's {name}", f"published weights of timm's {name}", {}
    )
