"""What a model is taught by: cross-entropy where an image shows one class, binary cross-entropies where several."""

from collections.abc import Callable

import torch
from torch.nn import functional

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Logits (b, classes) and targets to their mean loss in nats, a scalar."""


def find_loss(multi_label: bool) -> Loss:
    """The loss for images that show several classes each, or one."""
    return multi_label_loss if multi_label else functional.cross_entropy


def multi_label_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of every class, the mean over classes and images (Anderson & Farrell, WACV 2022).

    The few classes that an image shows weigh as much as the many that it does not: positives count
    ``classes / number of positives`` times, for each image by itself.

    Args:
        logits: (b, classes).
        targets: (b, classes) float, 1 where an image shows a class; shares where images were mixed.
    """
    weight = targets.shape[1] / targets.sum(1, keepdim=True).clamp(min=1e-6)
    return functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight)
