"""Scores of a model over samples that several processes share."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from fractalshards.errors import FractalError
from fractaltrain.inputs import to_input
from fractaltrain.losses import multi_label_loss
from fractaltrain.recipes.recipe import Recipe
from fractaltrain.stream.loader import Batch
from fractaltrain.world import World

LEADING = ("top1", "map")
"""The score that tells which epoch was best, by what images show: one class, or several."""


_LEAST_BATCH = 64  # of a process


@dataclass(frozen=True)
class Scores:
    """Mean cross-entropy in nats, and shares in [0, 1] of samples whose class is the first guess or in the first 5."""

    samples: int
    loss: float
    top1: float
    top5: float

    def __str__(self) -> str:
        return f"top-1 {self.top1:.2%}  top-5 {self.top5:.2%}  loss {self.loss:.4f}  {self.samples:,} images"


@dataclass(frozen=True)
class MultiLabelScores:
    """Of images with several classes each.

    Attributes:
        loss: mean of ``losses.multi_label_loss``, in nats.
        map: mean average precision in [0, 1], over the classes that some sample shows: how well samples that show a
            class are ranked before those that do not.
        f1: harmonic mean in [0, 1] of precision and recall of all (sample, class) pairs together, see ``micro_f1``.
    """

    samples: int
    loss: float
    map: float
    f1: float

    def __str__(self) -> str:
        return f"mAP {self.map:.2%}  F1 {self.f1:.2%}  loss {self.loss:.4f}  {self.samples:,} images"


def evaluation_batch(recipe: Recipe, world: World) -> int:
    """Images of all processes together that are evaluated at once: without gradients a small training batch, which
    takes long, needs not be so small."""
    return max(recipe.batch_size, _LEAST_BATCH * world.size)


def predict(
    model: nn.Module, batches: Iterable[Batch], recipe: Recipe, dtype: torch.dtype, world: World
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What the model says of each batch: logits (b, classes) float32 and labels, on the device.

    Ranks may have different numbers of batches, so ``model`` must not be wrapped in DDP. Its buffers (batch norm
    statistics) are taken from rank 0 first, as a checkpoint has them. It is left in evaluation mode.

    Args:
        dtype: of autocast; float32 means none.
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
        yield logits, batch.labels.to(world.device)


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    recipe: Recipe,
    dtype: torch.dtype,
    multi_label: bool,
    world: World,
) -> Scores | MultiLabelScores:
    """Evaluate each rank's own batches and add up, so that every sample counts once; see ``predict``.

    Args:
        multi_label: labels are (b, classes) float32 instead of (b,) int64.

    Raises:
        FractalError: on all ranks, if the loss is no number.
    """
    predictions = predict(model, batches, recipe, dtype, world)
    return _multi_label_scores(predictions, world) if multi_label else _scores(predictions, world)


def _scores(predictions: Iterable[tuple[torch.Tensor, torch.Tensor]], world: World) -> Scores:
    totals = torch.zeros(4, dtype=torch.float64, device=world.device)
    for logits, labels in predictions:
        guesses = logits.topk(min(5, logits.shape[1])).indices
        hits = guesses == labels[:, None]
        loss = functional.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack([torch.ones_like(labels).sum(), loss, hits[:, 0].sum(), hits.sum()])
    samples, loss_sum, first, first_five = world.sum(totals).tolist()
    _check_loss(loss_sum)
    count = max(int(samples), 1)  # of a run that is being stopped, there may be none
    return Scores(int(samples), loss_sum / count, first / count, first_five / count)


def _multi_label_scores(predictions: Iterable[tuple[torch.Tensor, torch.Tensor]], world: World) -> MultiLabelScores:
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    mine: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]] = []
    for logits, targets in predictions:
        loss_sum += multi_label_loss(logits, targets).double() * len(logits)
        mine.append((logits.cpu().numpy(), targets.cpu().numpy() > 0))
    found = [batch for part in world.gather_at_main(mine) for batch in part]
    loss = float(world.sum(loss_sum))
    _check_loss(loss)
    nothing = MultiLabelScores(0, 0.0, 0.0, 0.0)
    return world.share(_score_together(found, loss) if found and world.main else nothing)


def _score_together(
    found: Sequence[tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]], loss: float
) -> MultiLabelScores:
    """The scores of all batches, on one rank: ranking every class takes time and memory."""
    logits, shown = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return multi_label_scores(logits, shown, loss, average_precisions(logits, shown))


def multi_label_scores(
    logits: npt.NDArray[np.float32], shown: npt.NDArray[np.bool_], loss: float, precisions: npt.NDArray[np.float64]
) -> MultiLabelScores:
    """The scores of samples, of which there may be none: (n, classes) each.

    Args:
        loss: of all samples together, in nats.
        precisions: ``average_precisions`` of them; their mean is over the classes that are shown at all.
    """
    mean = float(np.nanmean(precisions)) if shown.any() else 0.0
    return MultiLabelScores(len(logits), loss / max(len(logits), 1), mean, micro_f1(logits, shown))


def _check_loss(loss: float) -> None:
    if not isfinite(loss):
        raise FractalError(
            f"the loss on held-out images is {loss}; lower --lr or limit the gradients (--set clip_grad=1), and start "
            "again in another folder (--out)"
        )


def average_precisions(scores: npt.NDArray[np.float32], shown: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Of each class the area under its precision-recall steps, (classes,); NaN for those that no sample shows.

    Args:
        scores: (n, classes), higher where the class is more likely.
        shown: (n, classes), whether the sample shows the class.
    """
    from sklearn.metrics import average_precision_score  # it takes a second, which single labels do not need

    some = shown.any(0)
    found = np.full(shown.shape[1], np.nan)
    if some.any():
        found[some] = average_precision_score(shown[:, some], scores[:, some], average=None)
    return found


def micro_f1(logits: npt.NDArray[np.float32], shown: npt.NDArray[np.bool_]) -> float:
    """2 TP / (2 TP + FP + FN) over all samples and classes (n, classes); 0 if nothing is shown.

    A class is guessed where its probability is at least one half. The loss weighs the classes shown ``classes / number
    shown`` times, which adds the logarithm of that to the logits: it is taken out first.
    """
    if not shown.any():
        return 0.0
    guessed = logits >= np.log(shown.size / shown.sum())
    return 2 * int((guessed & shown).sum()) / (int(guessed.sum()) + int(shown.sum()))
