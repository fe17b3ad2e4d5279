"""Top-1 and top-5 accuracy over samples that several processes share."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from fractaltrain.inputs import to_input
from fractaltrain.recipes.recipe import Recipe
from fractaltrain.stream.loader import Batch
from fractaltrain.world import World


@dataclass(frozen=True)
class Scores:
    """Mean cross-entropy in nats, and shares in [0, 1] of samples whose class is the first guess or in the first 5."""

    samples: int
    loss: float
    top1: float
    top5: float


def evaluate(model: nn.Module, batches: Iterable[Batch], recipe: Recipe, dtype: torch.dtype, world: World) -> Scores:
    """Evaluate each rank's own batches and add up, so that every sample counts once.

    Ranks may have different numbers of batches, so ``model`` must not be wrapped in DDP. Its buffers (batch norm
    statistics) are taken from rank 0 first, as a checkpoint has them. It is left in evaluation mode.

    Args:
        dtype: of autocast; float32 means none.
    """
    for buffer in model.buffers():
        world.broadcast(buffer)
    model.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=world.device)
    with torch.inference_mode():
        for batch in batches:
            if not batch.keys:  # all of it was bad
                continue
            labels = batch.labels.to(world.device)
            images = to_input(batch.images.to(world.device), recipe)
            with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
                logits = model(images)
            guesses = logits.topk(min(5, logits.shape[1])).indices
            hits = guesses == labels[:, None]
            loss = functional.cross_entropy(logits.float(), labels, reduction="sum")
            totals += torch.stack([torch.ones_like(labels).sum(), loss, hits[:, 0].sum(), hits.sum()])
    samples, loss_sum, first, first_five = world.sum(totals).tolist()
    count = max(int(samples), 1)  # of a run that is being stopped, there may be none
    return Scores(int(samples), loss_sum / count, first / count, first_five / count)
