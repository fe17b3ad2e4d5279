"""What was said of images that show several classes each, added up: over all, and by class."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fractaltrain.evaluation import MultiLabelScores, average_precisions, multi_label_scores


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
