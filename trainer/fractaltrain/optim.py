"""Losses, parameter groups and learning rate schedules."""

from collections.abc import Callable
from math import cos, pi
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR, OneCycleLR

from fractalshards.errors import UsageError
from fractaltrain.models import head_names, is_head
from fractaltrain.recipes.recipe import TrainRecipe

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Maps logits (b, classes) and targets to the mean loss in nats, a scalar."""


def multi_label_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the binary cross-entropy, mean over classes and images, with balanced positives.

    Positive classes of an image are weighted by ``classes / number of positives``, so that they count as much as all
    the classes that it does not show (Anderson & Farrell, WACV 2022).

    Args:
        logits: (b, classes).
        targets: (b, classes) float, 1 where an image shows a class; shares where images were mixed.
    """
    weight = targets.shape[1] / targets.sum(1, keepdim=True).clamp(min=1e-6)
    return functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight)


_EMBEDDINGS = ("pos_embed", "cls_token", "dist_token", "reg_token")


class Rates(NamedTuple):
    """Peak learning rate and weight decay of a parameter."""

    lr: float
    weight_decay: float


def parameter_rates(model: nn.Module, recipe: TrainRecipe) -> dict[str, Rates]:
    """Return learning rate and weight decay of every parameter that is trained, by name.

    ``recipe.undecayed`` excludes parameters from weight decay: ``norms``: biases and parameters of normalisation
    layers, but not class token, position embedding and layer scale, as in the published code of Anderson & Farrell (a
    bias has ``bias`` in its own name, a normalisation layer has ``Norm`` in its class name); ``vectors``: parameters
    with one dimension, class token and position embedding (DeiT); ``none``: no parameters.
    """
    heads = head_names(model)
    rates = {}
    for prefix, module in model.named_modules():
        for own_name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            name = f"{prefix}.{own_name}" if prefix else own_name
            lr, decay = recipe.lr, recipe.weight_decay
            if is_head(name, heads):
                lr *= recipe.head_lr_factor
                decay = decay if recipe.head_weight_decay is None else recipe.head_weight_decay
            undecayed = {
                "norms": "Norm" in type(module).__name__ or "bias" in own_name,
                "vectors": parameter.ndim <= 1 or own_name in _EMBEDDINGS,
                "none": False,
            }
            rates[name] = Rates(lr, 0.0 if undecayed[recipe.undecayed] else decay)
    return rates


def build_optimizer(model: nn.Module, recipe: TrainRecipe, scaled: bool = False) -> torch.optim.Optimizer:
    """Build the optimiser, with one parameter group per distinct ``Rates``, in the order of the model's parameters.

    Frozen parameters are left out. A one-cycle schedule sets the momentum itself. Updates are fused, but not those of
    SGD under loss scaling: a step that is skipped would leave infinite momenta behind, or uninitialised ones.

    Args:
        scaled: whether the loss is scaled, as for float16.
    """
    parameters = dict(model.named_parameters())
    by_rates: dict[Rates, list[nn.Parameter]] = {}
    for name, rates in parameter_rates(model, recipe).items():
        if name in parameters:  # shared parameters have several names and are listed under the first
            by_rates.setdefault(rates, []).append(parameters[name])
    groups = [{"params": group, **rates._asdict()} for rates, group in by_rates.items()]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    momentum = recipe.max_momentum if recipe.schedule == "onecycle" else recipe.momentum
    return torch.optim.SGD(groups, momentum=momentum, fused=not scaled)


def build_schedule(optimizer: torch.optim.Optimizer, recipe: TrainRecipe, epoch_steps: int) -> LRScheduler:
    """Build the schedule for ``recipe.epochs`` epochs of ``epoch_steps`` optimiser steps each.

    Raises UsageError if the warm-up would not end before the training does.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    if recipe.schedule == "step":
        return MultiStepLR(optimizer, [epoch * epoch_steps for epoch in recipe.milestones], recipe.gamma)
    if recipe.schedule == "cosine":
        return LambdaLR(optimizer, [_cosine(recipe, peak, epoch_steps) for peak in peaks])
    steps = recipe.epochs * epoch_steps
    # A rise of exactly one step makes torch divide 0 by 0; one shorter by a billionth gives the same learning rates.
    pct_start = recipe.pct_start * (1 - 1e-9) if recipe.pct_start * steps == 1 else recipe.pct_start
    return OneCycleLR(
        optimizer,
        max_lr=peaks,
        total_steps=steps,
        pct_start=pct_start,
        div_factor=recipe.div_factor,
        final_div_factor=recipe.final_div_factor,
        base_momentum=recipe.base_momentum,
        max_momentum=recipe.max_momentum,
    )


def _cosine(recipe: TrainRecipe, peak: float, epoch_steps: int) -> Callable[[int], float]:
    """Return the learning rate by step as a share of ``peak``: a linear warm-up, then a cosine to ``min_lr``.

    As in DeiT, the cosine counts from the start of training, so the learning rate drops at the end of the warm-up.
    """
    warmup, total = recipe.warmup_steps or recipe.warmup_epochs * epoch_steps, recipe.epochs * epoch_steps
    if warmup >= total:
        raise UsageError(f"{warmup:,} warm-up steps, but {total:,} steps in all; lower them with --set warmup_steps=N")

    def share(step: int) -> float:
        if step < warmup:
            return (recipe.warmup_lr + (peak - recipe.warmup_lr) * step / warmup) / peak
        return (recipe.min_lr + (peak - recipe.min_lr) * (1 + cos(pi * min(step / total, 1))) / 2) / peak

    return share
