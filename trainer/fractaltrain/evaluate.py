"""Scores of a model over samples that several processes share."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from fractalshards.errors import FractalError
from fractalshards.human import one_line
from fractaltrain.distributed import World
from fractaltrain.optim import multi_label_loss
from fractaltrain.plotting import INK, MUTED, plain, save
from fractaltrain.recipes.recipe import TrainRecipe
from fractaltrain.stream.loader import Batch
from fractaltrain.stream.order import Indices
from fractaltrain.transforms import to_input

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


def evaluation_batch(recipe: TrainRecipe, world: World) -> int:
    """Images of all processes together that are evaluated at once: without gradients a small training batch, which
    takes long, needs not be so small."""
    return max(recipe.batch_size, _LEAST_BATCH * world.size)


def predict(
    model: nn.Module, batches: Iterable[Batch], recipe: TrainRecipe, dtype: torch.dtype, world: World
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
    recipe: TrainRecipe,
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


MOST_CELLS = 1000  # a side of the confusion matrix; with more classes, neighbours share a cell


class ClassScore(NamedTuple):
    """Of one class: its images, and shares in [0, 1] of them; None where it has no image."""

    label: int
    samples: int
    top1: float | None
    top5: float | None


@dataclass(frozen=True)
class Tally:
    """``labels`` (n,) int64 and ``guesses`` (n, 5) int64, the likeliest class first; fewer of fewer classes.

    ``loss_sum`` is the cross-entropy of all in nats.
    """

    headings = ("top-1", "top-5")

    classes: int
    labels: Indices
    guesses: Indices
    loss_sum: float

    def __str__(self) -> str:
        return (
            f"top-1 {self.top1:.2%}  top-5 {self.top5:.2%}  loss {self.loss:.4f}  {len(self.labels):,} held-out images"
        )

    def figures(self) -> dict[str, float]:
        """Those over all images, by name."""
        return {"samples": len(self.labels), "loss": self.loss, "top1": self.top1, "top5": self.top5}

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return self.loss_sum / max(len(self.labels), 1)

    @property
    def top1(self) -> float:
        """Share of images whose class is the first guess."""
        return float((self.guesses[:, 0] == self.labels).sum() / max(len(self.labels), 1))

    @property
    def top5(self) -> float:
        """Share of images whose class is among the guesses."""
        return float((self.guesses == self.labels[:, None]).sum() / max(len(self.labels), 1))

    def by_class(self) -> list[ClassScore]:
        """The scores of every class, by index."""
        hits = self.guesses == self.labels[:, None]
        samples, first, any_of = (
            np.bincount(self.labels, weights, self.classes).tolist() for weights in (None, hits[:, 0], hits.any(1))
        )
        return [
            ClassScore(label, count, first[label] / count, any_of[label] / count)
            if count
            else ClassScore(label, 0, None, None)
            for label, count in enumerate(samples)
        ]

    def confusion(self) -> Indices:
        """(k, k) int64: how many images of class i were taken for class j; k is ``classes``, but 1000 at most."""
        cells = min(self.classes, MOST_CELLS)
        truth, guess = (column * cells // self.classes for column in (self.labels, self.guesses[:, 0]))
        return np.bincount(truth * cells + guess, minlength=cells * cells).reshape(cells, cells)


class ClassPrecision(NamedTuple):
    """Of one class: the images that show it, and its average precision in [0, 1]; None where none does."""

    label: int
    samples: int
    average_precision: float | None


@dataclass(frozen=True)
class MultiLabelTally:
    """``logits`` (n, classes) float32, and whether an image shows a class, ``shown`` (n, classes).

    ``loss_sum`` is ``losses.multi_label_loss`` of all in nats.
    """

    headings = ("average precision",)

    logits: npt.NDArray[np.float32]
    shown: npt.NDArray[np.bool_]
    loss_sum: float

    def __str__(self) -> str:
        return str(self._scores)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.shown.shape[1])

    @cached_property
    def _precisions(self) -> npt.NDArray[np.float64]:
        return average_precisions(self.logits, self.shown)

    @cached_property
    def _scores(self) -> MultiLabelScores:
        return multi_label_scores(self.logits, self.shown, self.loss_sum, self._precisions)

    def figures(self) -> dict[str, float]:
        """Those over all images, by name, see ``evaluation.MultiLabelScores``."""
        return asdict(self._scores)

    def by_class(self) -> list[ClassPrecision]:
        """The average precision of every class, by index."""
        counts, precisions = self.shown.sum(0).tolist(), self._precisions.tolist()
        return [
            ClassPrecision(label, count, precisions[label] if count else None) for label, count in enumerate(counts)
        ]


PICTURE = "confusion.png"
_NUMBERED = 25  # with more classes, numbers in cells cannot be read
_NAMED = 120  # with more classes, axes have every so-manieth index
_LONGEST_NAME = 24


def draw_confusion(path: Path, counts: Indices, classes: int, names: Sequence[str], title: str) -> None:
    """Draw a confusion matrix.

    Args:
        counts: (k, k), images of class i that were taken for class j; with k < ``classes`` a cell is of several.
        names: by class index; indices are shown where there are none.

    Raises:
        OSError: if it cannot be written.
    """
    from matplotlib.figure import Figure  # it takes a second, which only the main process needs
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    size = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(3.2 + 0.55 * size if size <= _NUMBERED else 6 + 0.1 * size, 5, 16))
    figure = Figure(figsize=(side + 0.8, side), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1), facecolor="white")
    panel = figure.subplots()
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    panel.set_title(plain(one_line(title)), loc="left", color=INK, fontsize=12, fontweight="bold")
    panel.set_ylabel("class", color=MUTED)
    panel.set_xlabel("taken for", color=MUTED)
    panel.spines[:].set_visible(False)
    panel.tick_params(colors=INK, length=0, labelsize=9 if size <= _NUMBERED else 6.5)
    ticks, labels = _ticks(size, classes, names)
    upright = size <= _NUMBERED and all(len(label) <= 3 for label in labels)
    panel.set_xticks(ticks, labels, rotation=0 if upright else 90)
    panel.set_yticks(ticks, labels)
    bar = figure.colorbar(image, ax=panel, fraction=0.035, format=lambda share, _: f"{100 * share:.0f} %")
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=9, length=0)
    if size <= _NUMBERED:
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.55 else INK
            panel.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=color, fontsize=9)
    save(figure, path)


def _ticks(size: int, classes: int, names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Where labels stand along an axis, and what they say."""
    if size <= _NAMED:
        return list(range(size)), [_short(names[index]) if names else str(index) for index in range(size)]
    ticks = list(range(0, size, max(size // 20, 1)))
    return ticks, [f"{tick * classes // size:,}" for tick in ticks]


def _short(name: str) -> str:
    shown = one_line(name)
    return plain(shown if len(shown) <= _LONGEST_NAME else f"{shown[: _LONGEST_NAME - 1]}…")
