"""What learns: a model with its optimiser, schedule and averages, placed on its device and ready to take steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fractaltrain.compute import (
    autocast_dtype,
    compiled,
    memory_format,
    set_determinism,
    synchronised,
    with_gradients_laid_out,
)
from fractaltrain.losses import find_loss
from fractaltrain.optim import build_optimizer, build_schedule
from fractaltrain.settings import Running
from fractaltrain.step import Step
from fractaltrain.world import World


@dataclass(frozen=True)
class Learner:
    """A model in training.

    Attributes:
        model: neither wrapped nor compiled.
        averaged: exponential moving average of its weights, where the recipe asks for one.
        take_step: the optimiser step.
        parts: all that has a state, by the name it has in checkpoints.
    """

    model: nn.Module
    averaged: ModelEmaV3 | None
    take_step: Step
    parts: Mapping[str, Any]

    @property
    def lr(self) -> float:
        """Learning rate of the next step; that of the backbone where it learns and the classifier has its own."""
        rate: float = self.take_step.optimizer.param_groups[0]["lr"]
        return rate

    @property
    def evaluated(self) -> nn.Module:
        """The model whose accuracy counts: the averaged one, where there is one."""
        return self.averaged.module if self.averaged else self.model

    def state(self) -> dict[str, Any]:
        """State dicts by name, for a checkpoint."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def learn(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Take a step and follow it with the average; see ``Step``."""
        loss = self.take_step(images, labels)
        if self.averaged:
            self.averaged.update(self.model, step=self.take_step.schedule.last_epoch)  # which counts steps
        return loss


def build_learner(model: nn.Module, running: Running, multi_label: bool, epoch_steps: int, world: World) -> Learner:
    """Place a model on this process's device and give it all that learning takes.

    Args:
        model: with its starting weights, the same on every rank.
        multi_label: images show several classes each.
        epoch_steps: optimiser steps in an epoch.

    Raises:
        UsageError: if precision or batch norm do not fit the device.
        FractalError: if it cannot be compiled.
    """
    recipe, device = running.recipe, world.device
    dtype = autocast_dtype(running.amp, device)
    set_determinism(running.deterministic)
    if running.sync_batchnorm:
        model = synchronised(model, device)
    layout = memory_format(model, device)
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]  # as its documentation has it
    optimizer = build_optimizer(model, recipe)
    schedule = build_schedule(optimizer, recipe, epoch_steps)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler}
    averaged = ModelEmaV3(model, decay=recipe.ema, use_warmup=True) if recipe.ema else None
    if averaged:
        parts["ema"] = averaged.module
    wrapped = DistributedDataParallel(with_gradients_laid_out(model)) if world.size > 1 else None
    network = model if wrapped is None else wrapped
    take_step = Step(
        network=compiled(network) if running.compile else network,
        wrapped=wrapped,
        loss=find_loss(multi_label),
        optimizer=optimizer,
        schedule=schedule,
        scaler=scaler,
        dtype=dtype,
        layout=layout,
        accumulate=running.accumulate,
        clip_grad=recipe.clip_grad,
    )
    return Learner(model, averaged, take_step, parts)
