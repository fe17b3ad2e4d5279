"""One optimiser step on one global batch: forward, backward, clipping, update, schedule."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from fractaltrain.losses import Loss


@dataclass(frozen=True)
class Step:
    """What a step works with.

    Attributes:
        network: what is called: the model, perhaps wrapped and compiled.
        wrapped: the model as DDP wraps it, where there are several processes.
        loss: of logits (b, classes) and labels.
        dtype: of autocast; float32 means none.
        layout: memory format of the model, and so of its images.
        accumulate: parts of a rank's batch that are computed one after the other, their gradients added up.
        clip_grad: largest norm of all gradients together; None: no limit.
    """

    network: nn.Module
    wrapped: DistributedDataParallel | None
    loss: Loss
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    dtype: torch.dtype
    layout: torch.memory_format
    accumulate: int
    clip_grad: float | None

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Take the step; return the mean loss of this rank's batch, a float32 scalar on its device.

        Args:
            images: (b, 3, S, S) float32 on the model's device.
            labels: what the loss takes, there too: (b,) int64 or shares of classes (b, classes) float32.
        """
        images = images.contiguous(memory_format=self.layout)
        parts = list(zip(images.chunk(self.accumulate), labels.chunk(self.accumulate), strict=True))
        losses = []
        self.optimizer.zero_grad()
        for number, (some_images, some_labels) in enumerate(parts, start=1):
            with self._gradients_kept_here(number < len(parts)):
                with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
                    loss = self.loss(self.network(some_images), some_labels) / len(parts)
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch's backward has no types
            losses.append(loss.detach())
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        return torch.stack(losses).sum()

    def _gradients_kept_here(self, keep: bool) -> AbstractContextManager[None]:
        """Only with the last part the ranks add up their gradients."""
        return self.wrapped.no_sync() if keep and self.wrapped else nullcontext()
