"""Top-1 and top-5 accuracy over samples that several processes share."""

from collections.abc import Iterable, Iterator
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
    totals = torch.zeros(4, dtype=torch.float64, device=world.device)
    for logits, labels in predict(model, batches, recipe, dtype, world):
        guesses = logits.topk(min(5, logits.shape[1])).indices
        hits = guesses == labels[:, None]
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack([torch.ones_like(labels).sum(), loss, hits[:, 0].sum(), hits.sum()])
    samples, loss_sum, first, first_five = world.sum(totals).tolist()
    count = max(int(samples), 1)  # of a run that is being stopped, there may be none
    return Scores(int(samples), loss_sum / count, first / count, first_five / count)


def predict(
    model: nn.Module, batches: Iterable[Batch], recipe: Recipe, dtype: torch.dtype, world: World
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What the model says of each of this rank's batches: logits (b, classes) float32 and labels, on the device.

    Buffers are taken from rank 0 first; the model is left in evaluation mode.
    """
    for buffer in model.buffers():
        world.broadcast(buffer)
    model.eval()
    for batch in batches:
        if not batch.keys:  # all of it was bad
            continue
        with torch.inference_mode():
            images = to_input(batch.images.to(world.device), recipe)
            with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
                logits = model(images)
            logits = logits.float()
            labels = batch.labels.to(world.device)
        yield logits, labels
