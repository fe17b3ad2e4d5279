"""Create models by name and load pre-trained weights into them."""

import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.func import functional_call

from fractalshards.errors import FractalError, UsageError
from fractalshards.human import human_list, one_line
from fractaltrain.config import ModelArgument

IMAGE_SIZE = 224
"""Side in pixels of the square images that models take, unless data or pre-training say otherwise."""

_OURS = ("resnet50", "deit_small_patch32_224")
_OWN_OPTIONS = {"num_classes": "the dataset", "img_size": "--image-size", "drop_path_rate": "--set drop_path"}
_REFUSED = ("pretrained", "weights", "checkpoint", "cache_dir", "features_only", "scriptable", "exportable", "no_jit")
_POSITIONS = ("pos_embed", "relative_position_bias_table")


def create_model(
    name: str,
    classes: int,
    image_size: int,
    drop_path: float = 0.0,
    arguments: Mapping[str, ModelArgument] = MappingProxyType({}),
) -> nn.Module:
    """Create a model with random weights, drawn from torch's global generator.

    Args:
        name: ``resnet50`` (torchvision's, as in the published code), ``deit_small_patch32_224``, or any timm name.
        classes: outputs of the classifier.
        image_size: side in pixels of the square images the model takes.
        drop_path: largest rate of stochastic depth.
        arguments: further arguments of ``timm.create_model``, such as ``patch_size``.

    Raises:
        UsageError: if there is no such model, it has no stochastic depth, does not take an argument, or an argument is
            one that other options set or that loads weights.
        FractalError: if it cannot be built for that size, or does not take images of that size.
    """
    if name not in _OURS and not timm.is_model(name):
        names = sorted({*_OURS, *timm.list_models()})
        # "vit_tiny" resembles gcvit_tiny more than vit_tiny_patch16_224, which it begins
        close = [known for known in names if name and known.startswith(name)][:3] or get_close_matches(name, names)
        hint = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        raise UsageError(f"no model {name!r}; {hint}")
    for argument in arguments:
        if argument in _OWN_OPTIONS:
            raise UsageError(f"--model-arg {argument}: is set by {_OWN_OPTIONS[argument]}")
        if argument.startswith(_REFUSED) or not argument.isidentifier():  # a run.json from elsewhere may contain it
            raise UsageError(f"--model-arg {argument}: does not describe the architecture, so it cannot be set")
    options: dict[str, Any] = {**arguments, **({"drop_path_rate": drop_path} if drop_path else {})}
    model: nn.Module
    try:
        if name == "resnet50":
            model = torchvision.models.resnet50(num_classes=classes, **options)
        elif name == "deit_small_patch32_224":  # DeiT-S (Touvron et al. 2021) with larger patches; not in timm
            options = {"patch_size": 32, "embed_dim": 384, "depth": 12, "num_heads": 6} | options
            model = VisionTransformer(img_size=image_size, num_classes=classes, **options)
        else:
            model = timm.create_model(name, **timm_options(name, classes, image_size), **options)
        tensors = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        with torch.no_grad():  # shapes only: takes milliseconds, draws no random numbers, changes no weights
            scores = functional_call(model, tensors, (torch.empty(2, 3, image_size, image_size, device="meta"),))
    except Exception as error:  # models raise errors of many types
        if "drop_path_rate" in str(error):
            raise UsageError(f"{name} has no drop path, which the recipe needs; add --set drop_path=0") from error
        given = ", ".join(f"{argument}={value}" for argument, value in arguments.items())
        if given and isinstance(error, TypeError):  # not an argument of the model, or a value of another type
            raise UsageError(f"{name} does not take --model-arg {given} ({reason(error)})") from error
        raise FractalError(
            f"{name}{given and f' with {given}'} cannot take {image_size} x {image_size} images ({reason(error)}); "
            f"try another --image-size{given and ' or --model-arg'}"
        ) from error
    if getattr(scores, "shape", None) != (2, classes):
        raise FractalError(f"{name} does not return one score per class; choose another --model")
    return model


def describe_border(model: nn.Module, image_size: int) -> list[str]:
    """Return a line if the patches of a vision transformer do not cover square images of this side in pixels."""
    patches: Any = getattr(model, "patch_embed", None)
    patch, *_ = getattr(patches, "patch_size", (1,))
    lost = image_size % patch
    if not lost or getattr(patches, "dynamic_img_pad", False):
        return []
    return [
        f"the model's patches of {patch} pixels cover {image_size - lost} of the {image_size} pixels on each "
        f"side; choose a multiple of {patch} as --image-size"
    ]


def timm_options(name: str, classes: int | None, image_size: int) -> dict[str, Any]:
    """Return the arguments of ``timm.create_model`` for classes (None: those of the published weights) and image size.

    The image size is included only for models with weights that depend on it, such as position embeddings.
    """
    config = timm.get_pretrained_cfg(name)
    return {
        **({} if classes is None else {"num_classes": classes}),
        **({"img_size": image_size} if config is not None and config.fixed_input_size else {}),
    }


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the classifier's modules, e.g. ``("fc",)``; models with a distillation head have two."""
    if not hasattr(model, "get_classifier"):  # torchvision's ResNet
        return ("fc",)
    classifier: Any = model.get_classifier
    found = classifier()
    heads = found if isinstance(found, tuple | list) else (found,)
    return tuple(name for name, module in model.named_modules() if any(module is head for head in heads))


def is_head(name: str, heads: tuple[str, ...]) -> bool:
    """Return whether the parameter or module ``name`` belongs to one of the modules ``heads``."""
    return any(name == head or name.startswith(f"{head}.") for head in heads)


def freeze_backbone(model: nn.Module) -> None:
    """Train only the classifier: no other parameter requires a gradient afterwards."""
    heads = head_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_head(name, heads))


def set_training(model: nn.Module) -> None:
    """Put a model into training mode, but leave a frozen backbone in evaluation mode.

    Batch norms of a frozen backbone keep their statistics; its dropout and drop path are off.
    """
    heads = head_names(model)
    trained = any(parameter.requires_grad for name, parameter in model.named_parameters() if not is_head(name, heads))
    model.train(trained)
    for name in heads:
        model.get_submodule(name).train()


def choose_attention(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Turn off torch's fused attention in timm's models for bfloat16 on a CPU, where its backward pass is slow.

    A small ViT trains 1.9 times faster without it, see docs/performance.md.
    """
    if device.type == "cpu" and dtype == torch.bfloat16:
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]  # any attribute may be a parameter, for mypy


def load_backbone(model: nn.Module, weights: Mapping[str, torch.Tensor], where: str) -> str:
    """Load all weights but the classifier's into ``model``, which keeps its own; return a line about what was loaded.

    Position embeddings for another image size are resampled, as timm does. Raises FractalError if tensors are missing,
    unexpected or of another shape.

    Args:
        weights: state dict of the same model with any number of classes.
        where: source of the weights, for error messages.
    """
    heads = head_names(model)
    own = model.state_dict()
    expected = {name for name in own if not is_head(name, heads)}
    if odd := sorted(expected ^ {name for name in weights if not is_head(name, heads)}):
        raise FractalError(f"{where}: weights of another model ({human_list(odd, 3)} do not match); check --weights")
    positions = sorted(
        name for name in expected if name.endswith(_POSITIONS) and weights[name].shape != own[name].shape
    )
    weights = {**weights, **_resample(model, weights, positions)}
    if reshaped := sorted(name for name in expected if weights[name].shape != own[name].shape):
        raise FractalError(f"{where}: {human_list(reshaped, 3)} differ in shape; use the pre-training's --image-size")
    model.load_state_dict({name: weights[name] for name in expected}, strict=False)
    left, new = (", ".join(name for name in names if name not in expected) or "none" for names in (weights, own))
    resampled = f"; resampled to this image size: {human_list(positions, 3)}" if positions else ""
    return one_line(f"{len(expected)} tensors loaded{resampled}; not loaded: {left}; new: {new}")


def _resample(model: nn.Module, weights: Mapping[str, torch.Tensor], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Return the position embeddings ``names``, resampled by the function that timm has for the model's family."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if not names or convert is None:
        return {}
    try:
        converted = convert(dict(weights), model)
    except Exception:  # models raise errors of many types; wrong shapes are reported later
        return {}
    return {name: converted[name] for name in names if name in converted}


def load_published(model: str, image_size: int) -> tuple[str, Mapping[str, torch.Tensor]]:
    """Fetch timm's default weights of a model, or those of a tag (``resnet50.a1_in1k``), for an image size.

    timm's weights also fit torchvision's ``resnet50``: its tensors have the same names and shapes. Raises UsageError if
    timm publishes none, FractalError if they cannot be fetched.

    Returns:
        Name with tag, and the state dict with the original classifier.
    """
    config = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    if config is None or not config.has_weights:
        raise UsageError(f"timm publishes no weights for {model}; choose another --model, or --weights none")
    name = f"{config.architecture}.{config.tag}" if config.tag else str(config.architecture)
    options = timm_options(model, None, image_size)
    timm.create_model(model, **options)  # so that an error below comes from fetching
    try:
        return name, timm.create_model(model, pretrained=True, **options).state_dict()
    except Exception as error:  # hub clients raise errors of many types
        raise FractalError(
            f"timm's {name}: weights cannot be fetched ({reason(error)}); where compute nodes have no internet, run "
            f"python -c \"import timm; timm.create_model('{model}', pretrained=True)\" on one that has, with HF_HOME "
            "set to a folder that both see, then set HF_HOME and HF_HUB_OFFLINE=1 here"
        ) from error


def reason(error: Exception) -> str:
    """Return the message of a library's error on one short line, or its type if it has none."""
    if isinstance(error, KeyError):  # its message is the key alone
        return repr(error)
    return (one_line(str(error)) or type(error).__name__)[:200]
