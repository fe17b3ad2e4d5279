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


class Start(NamedTuple):
    """The model that a fine-tuning starts from."""

    model: str
    arguments: Mapping[str, ModelArgument]  # further arguments of ``timm.create_model``
    image_size: int  # side in pixels of the square images it takes, or was trained on
    weights: Mapping[str, torch.Tensor] | None = None  # with any classifier; None: random ones
    identity: str | None = None  # sha256 of the checkpoint, or the name of timm's weights
    source: str = ""  # the folder of the run, or the name of timm's weights
    origin: str = ""  # a line that says where they come from
    training: Mapping[str, Any] | None = None  # how the run was trained, as run.json says


def finetune(config: TrainConfig) -> None:
    """Fine-tune with a new classifier; evaluate on the val split. Runs in every rank.

    Raises FractalError as ``train`` does, or if weights or images are missing or damaged, or do not fit.
    """
    images, recipe = config.data, config.recipe
    assert not isinstance(images, DatasetConfig)
    with join_world() as world:
        start = load_start(config.model, world)
        image_size = config.model.image_size or start.image_size
        data = open_data(images, world)
        classes = data.train.classes
        torch.manual_seed(config.run.seed)
        model = create_model(start.model, classes, image_size, recipe.drop_path, start.arguments)
        messages = []
        if start.weights is not None:
            messages.append(f"{start.origin}: {load_backbone(model, start.weights, start.source)}")
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
            "model": start.model,
            **({"model_args": start.arguments} if start.arguments else {}),
            "classes": classes,
            "class_names": data.train.class_names,
            "weights": start.identity,
            **({"pretraining": start.training} if start.training else {}),
            "freeze": config.model.freeze,
        }
        train(config, model, data, image_size, facts, world)


def load_start(model: ModelConfig, world: World) -> Start:
    """Load the weights to start from, if any: the newest ones of a run, or timm's published ones.

    Raises FractalError if the folder holds no run or no readable checkpoint, or timm's weights cannot be fetched.
    """
    if isinstance(model.weights, Path):
        run = load_run(model.weights)
        settings, folder = run.settings, str(model.weights)
        architecture = settings.model, settings.model_args, settings.image_size
        training = {field.name: asdict(settings)[field.name] for field in fields(Training)}
        return Start(*architecture, run.checkpoint.weights, run.sha256, folder, run.origin, training)
    start = Start(model.name, dict(model.arguments), model.image_size or IMAGE_SIZE)
    if model.weights is None:
        return start
    with world.main_first():  # rank 0 may download
        name, weights = load_published(model.name, start.image_size)
    source, origin = f"timm's {name}", f"published weights of timm's {name}"
    return start._replace(weights=weights, identity=f"timm:{name}", source=source, origin=origin)
