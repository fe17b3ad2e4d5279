"""Starts a fine-tuning from the weights of a pre-training run: everything but the classifier."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fractalshards.errors import FractalError
from fractaltrain.models import head_names, is_head

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
