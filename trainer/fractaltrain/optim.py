"""The state of a training: model, loss, optimiser, learning rate schedule and averaged weights; and one step."""

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from math import cos, pi
from typing import Any, NamedTuple

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR, OneCycleLR

from fractalshards.errors import UsageError
from fractaltrain.config import PRECISIONS, Amp, RunConfig
from fractaltrain.distributed import World
from fractaltrain.models import choose_attention, head_names, is_head
from fractaltrain.recipes.recipe import TrainRecipe


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
    fields = ("div_factor", "final_div_factor", "base_momentum", "max_momentum")
    figures = {field: getattr(recipe, field) for field in fields}
    return OneCycleLR(optimizer, max_lr=peaks, total_steps=steps, pct_start=pct_start, **figures)


def _cosine(recipe: TrainRecipe, peak: float, epoch_steps: int) -> Callable[[int], float]:
    """Return the learning rate by step as a share of ``peak``: a linear warm-up, then a cosine to ``min_lr``.

    As in DeiT, the cosine counts from the start of training, so the learning rate drops at the end of the warm-up.
    """
    warmup, total = recipe.warmup_steps or recipe.warmup_epochs * epoch_steps, recipe.epochs * epoch_steps
    if warmup >= total:
        raise UsageError(f"{warmup:,} warm-up steps, but only {total:,} steps; lower them with --set warmup_steps=N")

    def share(step: int) -> float:
        if step < warmup:
            return (recipe.warmup_lr + (peak - recipe.warmup_lr) * step / warmup) / peak
        return (recipe.min_lr + (peak - recipe.min_lr) * (1 + cos(pi * min(step / total, 1))) / 2) / peak

    return share


@dataclass(frozen=True)
class TrainState:
    """A model in training, with everything that a step needs."""

    model: nn.Module  # neither wrapped nor compiled
    network: nn.Module  # the module to call: the model, wrapped by DDP and compiled if needed
    ema: ModelEmaV3 | None  # exponential moving average of the weights, if the recipe asks for one
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # mean over logits and targets, in nats
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    dtype: torch.dtype  # precision of autocast; float32: no autocast
    layout: torch.memory_format  # memory format of model and images: channels last for CNNs on GPUs
    accumulate: int  # parts in which a rank's batch is computed; their gradients add up
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
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product on a GPU
    torch.use_deterministic_algorithms(run.deterministic)
    torch.backends.cudnn.deterministic = run.deterministic
    torch.backends.cudnn.benchmark = not run.deterministic
    if run.sync_batchnorm:
        if device.type != "cuda":
            raise UsageError("--sync-batchnorm needs GPUs; drop it")
        model = convert_sync_batchnorm(model)  # including timm's batch norms
    choose_attention(model, device, dtype)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())  # a ViT has one, for its patches
    layout = torch.channels_last if device.type == "cuda" and convolutions > 1 else torch.contiguous_format
    model = model.to(device, memory_format=layout)  # type: ignore[call-overload]  # documented, but not in its types
    scaled = dtype == torch.float16
    if scaled:  # the first steps may be skipped, until the scale fits
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
