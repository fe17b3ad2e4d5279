"""Export the weights of a run as a safetensors file that ``timm.create_model`` loads."""

import json
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from fractalshards.errors import FractalError, UsageError
from fractalshards.storage import atomic_file
from fractaltrain.checkpoint import TrainedRun, load_run
from fractaltrain.models import timm_options
from fractaltrain.run_folder import RUN

_EXTENSION = ".safetensors"
_TIMM_NAMES = {"deit_small_patch32_224": "vit_small_patch32_224"}


def export_run(folder: Path, path: Path) -> tuple[str, str]:
    """Write the newest undamaged weights of a run to ``path``, with metadata that says how to use them.

    An equal export that is already there is left alone.

    Returns:
        A line that says where the weights come from, and Python code that loads the file as ``model``.

    Raises:
        UsageError: if ``path`` has another extension than timm expects.
        FractalError: if there is no such run, timm cannot load its model, or another file is there.
        OSError: if it cannot be written.
    """
    if path.suffix != _EXTENSION:
        raise UsageError(f"--out {path}: timm recognises such files by their extension, {_EXTENSION}; add it")
    run = load_run(folder)
    settings, weights = run.settings, run.checkpoint.weights
    name = _TIMM_NAMES.get(settings.model, settings.model)
    if not timm.is_model(name):  # timm.create_model would download one from a hub
        raise FractalError(f"{folder}: timm has no model {name!r}, which {RUN} names; check the folder")
    run.build_model()  # checks the arguments, which come from a file
    options = timm_options(name, settings.classes, settings.image_size) | settings.model_args
    try:
        timm.create_model(name, **options).load_state_dict(weights)
    except RuntimeError as error:
        raise FractalError(
            f"{folder}: its checkpoint does not fit timm's {name} with {settings.classes} classes, which {RUN} names; "
            "check the folder"
        ) from error
    tensors = {key: tensor.contiguous().clone() for key, tensor in weights.items()}
    metadata = _metadata(run, name)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, exclusive=True) as file:
            file.write(save(tensors, metadata))
    elif not _is_equal(path, metadata, tensors):
        raise FractalError(f"{path}: another file is there already; choose another --out, or remove it")
    arguments = ", ".join(f"{option}={value!r}" for option, value in (options | {"checkpoint_path": str(path)}).items())
    return run.origin, f"model = timm.create_model({name!r}, {arguments})"


def _metadata(run: TrainedRun, name: str) -> dict[str, str]:
    """Return the metadata, all of it text; mean and std are those of images in [0, 1]."""
    settings = run.settings
    return {
        "format": "pt",
        "model": name,
        "classes": str(settings.classes),
        "image_size": str(settings.image_size),
        **({"model_args": json.dumps(settings.model_args)} if settings.model_args else {}),
        "mean": json.dumps(settings.recipe.mean),
        "std": json.dumps(settings.recipe.std),
        "recipe": settings.recipe.name,
        "epochs": str(run.checkpoint.position.epoch),
        "checkpoint_sha256": run.sha256,
        **({"class_names": json.dumps(settings.class_names)} if settings.class_names else {}),
    }


def _is_equal(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a file is a complete export with this metadata and these tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            same = file.metadata() == metadata and set(file.keys()) == set(tensors)
            return same and all(torch.equal(file.get_tensor(key), tensor) for key, tensor in tensors.items())
    except SafetensorError:
        return False
