"""Weights that timm publishes, from its hub or where an earlier download has left them."""

from collections.abc import Mapping
from dataclasses import dataclass

import timm
import torch

from fractalshards.errors import FractalError, UsageError
from fractalshards.human import one_line
from fractaltrain.models import from_timm

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
    try:
        return Published(name, from_timm(model, None, image_size, pretrained=True).state_dict())
    except Exception as error:  # of whichever client fetches it: those of hubs raise many kinds
        reason = (one_line(str(error)) or type(error).__name__)[:_MOST]
        raise FractalError(
            f"timm's {name}: weights cannot be fetched ({reason}); where compute nodes have no internet, run "
            f"python -c \"import timm; timm.create_model('{model}', pretrained=True)\" on one that has, with HF_HOME "
            "set to a folder that both see, then set HF_HOME and HF_HUB_OFFLINE=1 here"
        ) from error
