"""The state of a training: model, optimiser, schedule and averaged weights; and one optimiser step."""

import os
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from fractalshards.errors import UsageError
from fractaltrain.config import PRECISIONS, Amp, RunConfig
from fractaltrain.distributed import World
from fractaltrain.models import choose_attention
from fractaltrain.optim import Loss, build_optimizer, build_schedule, multi_label_loss
from fractaltrain.recipes.recipe import TrainRecipe


@dataclass(frozen=True)
class TrainState:
    """A model in training."""

    model: nn.Module  # neither wrapped nor compiled
    network: nn.Module  # the module to call: the model, wrapped by DDP and compiled if needed
    ema: ModelEmaV3 | None  # exponential moving average of the weights, if the recipe asks for one
    loss: Loss
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    dtype: torch.dtype  # precision of autocast; float32: no autocast
    layout: torch.memory_format  # of model and images
    accumulate: int  # parts in which a rank's batch is computed; their gradients are added up
    clip_grad: float | None  # maximum norm of the gradient over all parameters

    @property
    def lr(self) -> float:
        """Learning rate of the next step; where the classifier has another one, that of the backbone."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate: the averaged one, if there is one."""
        return self.ema.module if self.ema else self.model

    def parts(self) -> dict[str, Any]:
        """Return everything that has a ``state_dict``, by its name in checkpoints."""
        parts = {name: getattr(self, name) for name in ("model", "optimizer", "schedule", "scaler")}
        return {**parts, **({"ema": self.ema.module} if self.ema else {})}


def build_state(
    model: nn.Module, recipe: TrainRecipe, run: RunConfig, multi_label: bool, epoch_steps: int, world: World
) -> TrainState:
    """Move a model to this rank's device and create optimiser, schedule and loss.

    Raises UsageError if precision or batch norm do not fit the device.

    Args:
        model: with its starting weights, the same on every rank.
        epoch_steps: optimiser steps of an epoch.
    """
    device = world.device
    dtype = autocast_dtype(run.amp, device)
    set_determinism(run.deterministic)
    if run.sync_batchnorm:
        if device.type != "cuda":
            raise UsageError("--sync-batchnorm needs GPUs; drop it")
        model = convert_sync_batchnorm(model)  # including timm's batch norms
    choose_attention(model, device, dtype)
    layout = memory_format(model, device)
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]  # documented, but not in its types
    scaled = dtype == torch.float16
    if scaled:  # the first steps may well be skipped, until the scale fits
        warnings.filterwarnings("ignore", "Detected call of .lr_scheduler.step", UserWarning)
    optimizer = build_optimizer(model, recipe, scaled)
    network: nn.Module = DistributedDataParallel(model) if world.size > 1 else model
    return TrainState(
        model=model,
        network=torch.compile(network) if run.compile else network,  # type: ignore[arg-type]  # it returns a module
        ema=ModelEmaV3(model, decay=recipe.ema, use_warmup=True) if recipe.ema else None,
        loss=multi_label_loss if multi_label else functional.cross_entropy,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, recipe, epoch_steps),
        scaler=torch.amp.GradScaler(device.type, enabled=scaled),
        dtype=dtype,
        layout=layout,
        accumulate=run.accumulate,
        clip_grad=recipe.clip_grad,
    )


def train_step(state: TrainState, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Take one optimiser step; return the mean loss of this rank's batch, a float32 scalar on its device.

    Args:
        images: (b, 3, S, S) float32 on the model's device.
        labels: (b,) int64, or (b, classes) float32 shares of classes, on the same device.
    """
    images = images.contiguous(memory_format=state.layout)
    parts = list(zip(images.chunk(state.accumulate), labels.chunk(state.accumulate), strict=True))
    losses = []
    state.optimizer.zero_grad()
    for number, (part_images, part_labels) in enumerate(parts, start=1):
        no_sync = getattr(state.network, "no_sync", nullcontext)  # DDP exchanges gradients with the last part only
        with no_sync() if number < len(parts) else nullcontext():
            with torch.autocast(images.device.type, state.dtype, enabled=state.dtype != torch.float32):
                loss = state.loss(state.network(part_images), part_labels) / len(parts)
            state.scaler.scale(loss).backward()
        losses.append(loss.detach())
    if state.clip_grad is not None:
        state.scaler.unscale_(state.optimizer)
        parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, state.clip_grad)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.schedule.step()
    if state.ema:
        state.ema.update(state.model, step=state.schedule.last_epoch)  # the number of steps taken
    return torch.stack(losses).sum()


def autocast_dtype(amp: Amp, device: torch.device) -> torch.dtype:
    """Return the precision of the forward pass, float32 for none; raises UsageError for float16 on a CPU."""
    if amp == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a GPU; choose bf16 or fp32")
    dtype: torch.dtype = getattr(torch, PRECISIONS[amp].removeprefix("torch."))
    return dtype


def memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Return channels last for convolutional networks on GPUs, whose tensor cores prefer it; else contiguous.

    A network is convolutional if it has more than one convolution: the only one of a ViT cuts images into patches.
    """
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    return torch.channels_last if device.type == "cuda" and convolutions > 1 else torch.contiguous_format


def set_determinism(deterministic: bool) -> None:
    """Make results bit-identical on the same hardware, or let cuDNN pick the fastest algorithms."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product on a GPU
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
