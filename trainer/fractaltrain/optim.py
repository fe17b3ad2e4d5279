"""The optimiser and the schedule that a recipe describes."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from fractaltrain.models import head_names, is_head
from fractaltrain.recipes.recipe import Recipe


@dataclass(frozen=True)
class Rates:
    """Peak learning rate and weight decay of a parameter."""

    lr: float
    weight_decay: float


def parameter_rates(model: nn.Module, recipe: Recipe) -> dict[str, Rates]:
    """The rates of every parameter, by name.

    No weight decay on biases and on parameters of normalisation layers; class token, position embedding and
    layer scale are decayed. A bias is a parameter with ``bias`` in its own name, a normalisation layer a module
    with ``Norm`` in its class name: the rule of the published code.
    """
    heads = head_names(model)
    rates = {}
    for prefix, module in model.named_modules():
        norm = "Norm" in type(module).__name__
        for own_name, _ in module.named_parameters(recurse=False):
            name = f"{prefix}.{own_name}" if prefix else own_name
            decay = recipe.weight_decay
            lr = recipe.lr
            if is_head(name, heads):
                lr *= recipe.head_lr_factor
                if recipe.head_weight_decay is not None:
                    decay = recipe.head_weight_decay
            rates[name] = Rates(lr, 0.0 if norm or "bias" in own_name else decay)
    return rates


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """SGD with one parameter group for each distinct pair of rates, in order of the model's parameters.

    Its momentum is what the schedule sets. One fused kernel per group, on GPUs and CPUs alike, updates all parameters.
    """
    parameters = dict(model.named_parameters())
    groups: dict[Rates, list[nn.Parameter]] = {}
    for name, rates in parameter_rates(model, recipe).items():
        if name in parameters and parameters[name].requires_grad:  # a shared parameter goes by its first name alone
            groups.setdefault(rates, []).append(parameters[name])
    return torch.optim.SGD(
        [{"params": group, "lr": rates.lr, "weight_decay": rates.weight_decay} for rates, group in groups.items()],
        momentum=recipe.max_momentum,
        fused=True,
    )


def build_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> OneCycleLR:
    """torch's OneCycleLR with cosine annealing over ``steps`` optimiser steps, momentum cycling against it.

    A rise of exactly one step (``pct_start * steps == 1``) makes torch divide 0 by 0; the same curve without that
    point is a rise that is shorter by a billionth.
    """
    pct_start = recipe.pct_start * (1 - 1e-9) if recipe.pct_start * steps == 1 else recipe.pct_start
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        total_steps=steps,
        pct_start=pct_start,
        div_factor=recipe.div_factor,
        final_div_factor=recipe.final_div_factor,
        base_momentum=recipe.base_momentum,
        max_momentum=recipe.max_momentum,
    )
