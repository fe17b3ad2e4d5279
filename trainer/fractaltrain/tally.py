"""What was guessed for each image, added up: over all, by class, and which class was taken for which."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fractaltrain.stream.order import Indices

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
