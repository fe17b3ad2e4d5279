"""A run that was trained, read back from its folder: what it is, its recipe, and its newest sound weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError
from fractalshards.fields import Fields
from fractalshards.human import human_count, one_line
from fractalshards.overrides import override
from fractaltrain.checkpoint import Checkpoint, Position, load_checkpoint, model_weights
from fractaltrain.models import create_model
from fractaltrain.recipes.recipe import Recipe
from fractaltrain.run_folder import RUN, settings_of


@dataclass(frozen=True)
class Trained:
    """A run of pre-training or fine-tuning.

    Attributes:
        classes: outputs of its classifier.
        class_names: of what it was fine-tuned on, by class index; empty where nobody knows.
        data: ``--data`` of a fine-tuning, None of a pre-training.
        per_class: training images of every class that ``subset_seed`` chose; None: all.
        recipe: with all overrides applied.
        precision: of the forward pass.
        position: how far training had come.
        weights: state dict of its model, on the CPU.
        sha256: of the checkpoint that they are from.
        passed_over: what is wrong with newer checkpoints, a line each.
    """

    folder: Path
    model: str
    classes: int
    image_size: int
    class_names: tuple[str, ...]
    data: str | None
    per_class: int | None
    subset_seed: int
    recipe: Recipe
    precision: torch.dtype
    position: Position
    weights: Mapping[str, torch.Tensor]
    sha256: str
    passed_over: tuple[str, ...]

    def origin(self) -> str:
        """Where its weights are from, for people."""
        return describe_origin(self.folder, self.position, self.passed_over)

    def rebuilt(self) -> nn.Module:
        """Its model with its weights.

        Raises:
            FractalError: if they do not fit the model that ``run.json`` names.
        """
        model = create_model(self.model, self.classes, self.image_size)
        try:
            model.load_state_dict(dict(self.weights))
        except RuntimeError as error:
            raise FractalError(
                f"{self.folder}: its checkpoint holds weights of another model than {self.model} with {self.classes} "
                f"classes, which its {RUN} names; check the folder"
            ) from error
        return model


def load_trained(folder: Path) -> Trained:
    """Read a run.

    Raises:
        FractalError: if the folder holds no run, or none with a sound checkpoint, or ``run.json`` is damaged.
    """
    settings = settings_of(folder)
    path = folder / RUN
    classes = settings.count("classes")
    names = settings.texts("class_names") if "class_names" in settings else ()
    if len(names) not in (0, classes):
        raise FractalError(f"{path}: {len(names)} class_names for {classes} classes; train it again")
    checkpoint = sound_checkpoint(folder)
    return Trained(
        folder=folder,
        model=settings.text("model"),
        classes=classes,
        image_size=settings.count("image_size"),
        class_names=names,
        data=settings.text("data") if "data" in settings else None,
        per_class=_count_or_none(settings, "per_class"),
        subset_seed=_count_or_none(settings, "subset_seed") or 0,
        recipe=_read_recipe(settings.mapping("recipe"), path),
        precision=_read_precision(settings.text("precision"), path),
        position=checkpoint.position,
        weights=model_weights(checkpoint),
        sha256=sha256_file(checkpoint.path),
        passed_over=checkpoint.passed_over,
    )


def describe_origin(folder: Path, position: Position, passed_over: Sequence[str]) -> str:
    """Where weights are from, for people: how far the run had come, after what is wrong with newer checkpoints."""
    passed = "".join(f"{problem}; taking the one before\n" for problem in passed_over)
    begun = f" and {human_count(position.step, 'step')} of the next" if position.step else ""
    return f"{passed}weights of {folder} after {human_count(position.epoch, 'epoch')}{begun}"


def sound_checkpoint(folder: Path) -> Checkpoint:
    """The newest sound checkpoint of a run.

    Raises:
        FractalError: if there is none.
    """
    checkpoint = load_checkpoint(folder)
    if checkpoint is None:
        raise FractalError(f"{folder}: no checkpoint yet; let its training save one first")
    return checkpoint


def _count_or_none(settings: Fields, name: str) -> int | None:
    return settings.count(name) if name in settings and not settings.is_null(name) else None


def _read_recipe(figures: Mapping[str, Any], path: Path) -> Recipe:
    """The recipe of ``run.json``; figures that this version does not know are passed over."""
    known = {field.name for field in fields(Recipe)}
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in figures.items() if name in known
    }
    try:
        recipe = Recipe(**values)
        return override(recipe, {name: value for name, value in values.items() if name != "name"})  # checks their types
    except (TypeError, ValueError, FractalError) as error:
        raise FractalError(f"{path}: its recipe cannot be read ({one_line(str(error))}); train it again") from error


def _read_precision(name: str, path: Path) -> torch.dtype:
    known = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    if name not in known:
        raise FractalError(f"{path}: precision {name} is none of {', '.join(known)}; train it again")
    return known[name]
