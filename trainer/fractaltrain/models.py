"""Models by name: one entry, ``create_model``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fractalshards.errors import FractalError, UsageError
from fractalshards.human import one_line

IMAGE_SIZE = 224  # of square images, where neither data nor pre-training say otherwise


def _resnet50(classes: int, image_size: int, drop_path: float) -> nn.Module:
    """torchvision's, as in the published code; it sees any size."""
    if drop_path:
        raise _no_drop_path("resnet50")
    model: nn.Module = torchvision.models.resnet50(num_classes=classes)
    return model


def _deit_small_patch32(classes: int, image_size: int, drop_path: float) -> nn.Module:
    """DeiT-S (Touvron et al. 2021) with patches of 32 x 32, which timm does not list."""
    return VisionTransformer(
        img_size=image_size,
        patch_size=32,
        embed_dim=384,
        depth=12,
        num_heads=6,
        num_classes=classes,
        drop_path_rate=drop_path,
    )


_OURS: dict[str, Callable[[int, int, float], nn.Module]] = {
    "resnet50": _resnet50,
    "deit_small_patch32_224": _deit_small_patch32,
}


def create_model(name: str, classes: int, image_size: int, drop_path: float = 0.0) -> nn.Module:
    """A model with random weights, drawn from torch's generator.

    Args:
        name: ``resnet50`` (torchvision), ``deit_small_patch32_224``, or any name timm knows.
        classes: outputs of its classifier.
        image_size: side in pixels of the square images it will see.
        drop_path: largest rate of stochastic depth.

    Raises:
        UsageError: if there is no such model, or it has no stochastic depth.
        FractalError: if it cannot be built for that size.
    """
    if name not in _OURS and not timm.is_model(name):
        close = get_close_matches(name, {*_OURS, *timm.list_models()}, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() names them all"
        raise UsageError(f"no model {name!r}; {hint}")
    try:
        build = _OURS.get(name, partial(from_timm, name))
        return build(classes, image_size, drop_path)
    except (TypeError, ValueError, AssertionError) as error:
        raise FractalError(
            f"{name} cannot be built for {image_size} x {image_size} images: {error}; try another --image-size"
        ) from error


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier's modules, e.g. ``("fc",)``; two for models with a distillation head."""
    if not hasattr(model, "get_classifier"):  # torchvision's ResNet
        return ("fc",)
    classifier: Any = model.get_classifier
    found = classifier()
    heads = found if isinstance(found, tuple | list) else (found,)
    return tuple(name for name, module in model.named_modules() if any(module is head for head in heads))


def freeze_backbone(model: nn.Module) -> None:
    """Let only the classifier learn."""
    heads = head_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_head(name, heads))


def set_training(model: nn.Module) -> None:
    """Put a model into training mode; a frozen backbone stays in evaluation mode, and only its classifier trains.

    So its batch norms keep their statistics, and nothing in it is dropped.
    """
    heads = head_names(model)
    learns = any(parameter.requires_grad for name, parameter in model.named_parameters() if not is_head(name, heads))
    model.train(learns)
    for name in heads:
        model.get_submodule(name).train()


def is_head(name: str, heads: tuple[str, ...]) -> bool:
    """Whether the parameter or module ``name`` belongs to one of the modules ``heads``."""
    return any(name == head or name.startswith(f"{head}.") for head in heads)


def from_timm(
    name: str, classes: int | None, image_size: int, drop_path: float = 0.0, pretrained: bool = False
) -> nn.Module:
    """timm's model, for images of a size where its weights depend on that; ``classes`` None: as many as it has."""
    options = timm_options(name, classes, image_size)
    options |= {"drop_path_rate": drop_path} if drop_path else {}
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise _no_drop_path(name) from error
    return model


def _no_drop_path(name: str) -> UsageError:
    return UsageError(f"{name} has no drop path, which the recipe asks for; add --set drop_path=0")


def timm_options(name: str, classes: int | None, image_size: int) -> dict[str, Any]:
    """What ``timm.create_model`` must be told besides a model's name."""
    config = timm.get_pretrained_cfg(name)
    fixed = config is not None and config.fixed_input_size  # the weights depend on it (position embeddings)
    return {
        **({} if classes is None else {"num_classes": classes}),
        **({"img_size": image_size} if fixed else {}),
    }


_SHOWN = 3


@dataclass(frozen=True)
class LoadReport:
    """Names of the tensors that came from the checkpoint, of those left in it, and of those that start anew."""

    loaded: tuple[str, ...]
    left: tuple[str, ...]
    new: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.loaded)} tensors loaded; not loaded: {', '.join(self.left) or 'none'}; "
            f"new: {', '.join(self.new) or 'none'}"
        )


def load_backbone(model: nn.Module, weights: Mapping[str, torch.Tensor], where: str) -> LoadReport:
    """Copy all weights but the classifier's into ``model``; its classifier keeps its random start.

    Args:
        weights: state dict of the same model with any number of classes.
        where: what errors call them.

    Raises:
        FractalError: if tensors are missing, left over, or of another shape: the weights of another model.
    """
    heads = head_names(model)
    own = model.state_dict()
    expected = {name for name in own if not is_head(name, heads)}
    given = {name for name in weights if not is_head(name, heads)}
    odd = sorted(expected ^ given)
    if odd:
        raise FractalError(f"{where}: weights of another model ({_list(odd)} do not match); check --weights")
    reshaped = sorted(name for name in expected if weights[name].shape != own[name].shape)
    if reshaped:
        raise FractalError(
            f"{where}: {_list(reshaped)} have another shape here; fine-tune at the pre-training's --image-size"
        )
    model.load_state_dict({name: weights[name] for name in expected}, strict=False)
    return LoadReport(
        loaded=tuple(name for name in own if name in expected),
        left=tuple(name for name in weights if name not in expected),
        new=tuple(name for name in own if name not in expected),
    )


def _list(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


_MOST = 200  # characters of what a client says


@dataclass(frozen=True)
class Published:
    """``name`` has the tag, which says what they were trained on; ``weights``, a state dict, have their classifier."""

    name: str
    weights: Mapping[str, torch.Tensor]


def load_published(model: str, image_size: int) -> Published:
    """The default weights of a model, or those of a tag (``resnet50.a1_in1k``), fitted to the image size.

    torchvision's ``resnet50`` takes those of timm's: tensors have the same names and shapes.

    Raises:
        UsageError: if timm publishes none.
        FractalError: if they cannot be fetched.
    """
    config = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    if config is None or not config.has_weights:
        raise UsageError(f"timm publishes no weights of {model}; choose another --model, or --weights none")
    name = f"{config.architecture}.{config.tag}" if config.tag else str(config.architecture)
    from_timm(model, None, image_size)  # so that what fails below is the fetching
    try:
        return Published(name, from_timm(model, None, image_size, pretrained=True).state_dict())
    except Exception as error:  # of whichever client fetches it: those of hubs raise many kinds
        reason = (one_line(str(error)) or type(error).__name__)[:_MOST]
        raise FractalError(
            f"timm's {name}: weights cannot be fetched ({reason}); where compute nodes have no internet, run "
            f"python -c \"import timm; timm.create_model('{model}', pretrained=True)\" on one that has, with HF_HOME "
            "set to a folder that both see, then set HF_HOME and HF_HUB_OFFLINE=1 here"
        ) from error
