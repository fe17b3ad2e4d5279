"""Export the weights of a run for timm: as a folder in the form of its hub, with a model card, or as one file."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCardData
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from timm.models._hub import save_config_for_hf

from fractalshards.digest import mapping_digest
from fractalshards.errors import FractalError, UsageError
from fractalshards.human import human_count, one_line
from fractalshards.remote.card import README, citation, licence
from fractalshards.storage import atomic_file, read_json, remove_leftovers, write_bytes
from fractaltrain.checkpoint import TrainedRun, load_run
from fractaltrain.models import timm_options
from fractaltrain.recipes import FT_RECIPES, PT_RECIPES, for_dataset
from fractaltrain.run_folder import RESULT, RUN, Training

_EXTENSION, _OTHERS = ".safetensors", (".pt", ".pth", ".bin", ".ckpt", ".tar")
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"  # as timm names them
_TIMM_NAMES = {"deit_small_patch32_224": "vit_small_patch32_224"}
_KEPT = ("architecture", "first_conv", "classifier", "fixed_input_size")  # fields that describe the architecture
_MAX_LABELS = 1000  # most class names in config.json
_VIEWS = {  # how ``val_transform`` shows an image, in timm's words
    "none": {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"},
    "random": {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center"},  # the same for images of this size
    "resized": {"interpolation": "bicubic", "crop_pct": 224 / 256, "crop_mode": "center"},
}


def export_run(folder: Path, path: Path) -> tuple[str, str]:
    """Write the newest undamaged weights of a run, and what timm needs to load them.

    A path that ends in ``.safetensors`` becomes one file, any other a folder to upload as it is: ``model.safetensors``,
    a model card ``README.md``, and ``config.json`` last. Files from an earlier export of the same weights are kept.

    Returns:
        A line that says where the weights come from, and Python code that loads them as ``model``.

    Raises:
        UsageError: if ``path`` has the extension of another format.
        FractalError: if there is no such run, timm cannot load its model, or ``path`` holds something else.
        OSError: if a file cannot be written.
    """
    if path.suffix in _OTHERS:
        raise UsageError(f"--out {path}: give a folder, or a file with the extension {_EXTENSION}")
    run = load_run(folder)
    settings, weights = run.settings, run.checkpoint.weights
    name = _TIMM_NAMES.get(settings.model, settings.model)
    if not timm.is_model(name):  # timm.create_model would download one from a hub
        raise FractalError(f"{folder}: timm has no model {name!r}, which {RUN} names; check the folder")
    run.build_model()  # checks the arguments, which come from a file
    options = timm_options(name, settings.classes, settings.image_size) | settings.model_args
    try:
        model = timm.create_model(name, **options)
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:  # torchvision's ResNet takes other arguments
        raise FractalError(
            f"{folder}: its checkpoint does not fit timm's {name} with {settings.classes} classes, which {RUN} names; "
            "check the folder"
        ) from error
    single = path.suffix == _EXTENSION
    remove_leftovers(path.parent if single else path)
    if not single and path.is_dir() and any(path.iterdir()) and not (path / _WEIGHTS).exists():
        raise FractalError(f"{path}: not empty, and not an export; choose another --out, or empty it")
    _write_weights(path if single else path / _WEIGHTS, run, name)
    if single:
        arguments = ", ".join(f"{key}={value!r}" for key, value in (options | {"checkpoint_path": str(path)}).items())
        return run.origin, f"model = timm.create_model({name!r}, {arguments})"
    for file, content in ((README, _card(run, name, path.resolve().name)), (_CONFIG, _config(run, model, options))):
        if not (path / file).exists():
            write_bytes(path / file, content)
    return run.origin, f"model = timm.create_model({f'local-dir:{path}'!r}, pretrained=True)"


def _write_weights(path: Path, run: TrainedRun, name: str) -> None:
    """Write a safetensors file, unless the same export is there; its mean and std apply to pixels in [0, 1]."""
    settings = run.settings
    metadata = {
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
    tensors = {key: tensor.contiguous().clone() for key, tensor in run.checkpoint.weights.items()}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, exclusive=True) as file:
            file.write(save(tensors, metadata))
    elif not _is_equal(path, metadata, tensors):
        raise FractalError(f"{path}: another file is there already; choose another --out, or remove it")


def _is_equal(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> bool:
    """Return whether a file is an export with this metadata and these tensors; a damaged one is not."""
    with suppress(SafetensorError), safe_open(path, framework="pt") as file:
        same = file.metadata() == metadata and set(file.keys()) == set(tensors)
        return same and all(torch.equal(file.get_tensor(key), tensor) for key, tensor in tensors.items())
    return False


def _config(run: TrainedRun, model: Any, options: Mapping[str, Any]) -> bytes:
    """Return timm's ``config.json``: the model, and how to prepare images for it."""
    settings = run.settings
    recipe, size = settings.recipe, settings.image_size
    own = {key: value for key, value in model.pretrained_cfg.items() if key in _KEPT}
    images = {"input_size": (3, size, size), "mean": recipe.mean, "std": recipe.std, **_VIEWS[recipe.crop]}
    model.pretrained_cfg = {**own, **images, "num_classes": settings.classes}
    names = {"label_names": settings.class_names} if 0 < len(settings.class_names) <= _MAX_LABELS else {}
    arguments = {key: value for key, value in options.items() if key != "num_classes"}
    with TemporaryDirectory() as scratch:
        file: Any = Path(scratch, _CONFIG)  # typed as str, which old versions of timm do not take
        save_config_for_hf(model, file, names, arguments)
        return bytes(file.read_bytes())


def _card(run: TrainedRun, name: str, title: str) -> bytes:
    """Return the model card: metadata for the hub, how to load the model, and how it was trained."""
    settings = run.settings
    stages: list[Training] = [settings]
    while before := stages[0].pretraining:
        stages.insert(0, before)
    figures = read_json(run.folder / RESULT, dict[str, float]) if (run.folder / RESULT).exists() else {}
    data, top1 = _place(settings), figures.get("top1")
    head = ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        license="unknown" if settings.data else licence(settings.dataset_recipe),
        tags=["timm", "image-classification", "fractalpretrain"],
        datasets=[digest for stage in stages if (digest := stage.dataset_digest)],
        model_name=title,
        eval_results=None if top1 is None else [EvalResult("image-classification", data, data, "accuracy", top1)],
    )
    cited = {name for stage in stages for name in (stage.recipe.name, str(stage.dataset_recipe.get("kind")))}
    lines = [
        *(line for stage in stages for line in _describe(stage)),
        f"Weights after {human_count(run.checkpoint.position.epoch, 'epoch')}, checkpoint with sha256 `{run.sha256}`",
        *([f"Figures: {', '.join(f'{key} {value:.5g}' for key, value in figures.items())}"] if figures else []),
    ]
    return f"""---
{head.to_yaml()}
---

# {title}

timm's `{name}` for {settings.classes:,} classes and images of {settings.image_size} x {settings.image_size} pixels, \
trained with fractalpretrain.

```python
import timm

model = timm.create_model("local-dir:{title}", pretrained=True).eval()  # from the hub: "hf-hub:USER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

## Training

{"".join(f"- {one_line(line)}.{chr(10)}" for line in lines)}{citation(*cited)}""".encode()


def _describe(stage: Training) -> Iterator[str]:
    """Describe the images and the recipe of a training, one line each."""
    recipe, dataset = stage.recipe, stage.dataset_recipe
    kind = one_line(str(dataset.get("kind", "")))
    if stage.data:
        yield f"Fine-tuned on `{_place(stage)}`" + (f", starting from `{stage.weights}`" if stage.weights else "")
    else:
        yield f"Pre-trained on `{_place(stage)}`" + (", new images in every epoch" if stage.fresh else "")
    if dataset:
        digest = mapping_digest(dataset)
        content = f", content digest `{stage.dataset_digest}`" if stage.dataset_digest != digest else ""  # never built
        contents = f"kind `{kind}`, {dataset.get('classes')} classes, {dataset.get('n')} images"
        yield f"Dataset: {contents}; recipe digest `{digest}`{content}"
    published = (FT_RECIPES if stage.data else PT_RECIPES).get(recipe.name)
    if published and not stage.data:
        published = for_dataset(published, kind)
    changed = [f"{key}={value}" for key, value in asdict(recipe).items() if value != getattr(published, key, value)]
    yield f"Training recipe `{recipe.name}`; changed: {', '.join(changed) or 'nothing'}"


def _place(stage: Training) -> str:
    """Return the name of a training's images, without the folder that they were in."""
    return one_line(Path(stage.data or stage.dataset or "").name)
