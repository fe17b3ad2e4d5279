import numpy as np
import pytest
import torch
from torch import nn

from fractaltrain.data.source import ArraySource
from fractaltrain.evaluation import evaluate
from fractaltrain.inputs import evaluation_geometry
from fractaltrain.recipes import PRETRAINING
from fractaltrain.stream.loader import Batches, Loading, iterate
from fractaltrain.stream.order import evaluation_positions
from fractaltrain.world import World

ALONE = World(rank=0, size=1, local_size=1, device=torch.device("cpu"))


class Remembers(nn.Module):
    """Reads from the first pixel which row of a table its logits are."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[(images[:, 0, 0, 0] * 255).round().long()]


@pytest.mark.parametrize(("classes", "batch"), [(10, 7), (10, 64), (3, 5)])
def test_scores_by_hand(classes, batch):
    count = 53
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(count, classes)).astype(np.float32)
    labels = generator.integers(0, classes, count)
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 3))
    source = ArraySource("table", images, labels, classes)
    batches = Batches(
        source,
        evaluation_geometry(PRETRAINING["anderson"], 8),
        evaluation_positions(count, batch, 0, 1),
        np.arange(count),
        seed=0,
        epoch=0,
    )
    model = Remembers(torch.from_numpy(logits))
    loaded = iterate(batches, 0, Loading(workers=0, pin_memory=False))
    scores = evaluate(model, loaded, PRETRAINING["anderson"], torch.float32, ALONE)
    ranks = (logits > logits[np.arange(count), labels][:, None]).sum(1)
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(count), labels]
    assert scores.samples == count
    assert scores.top1 == pytest.approx((ranks < 1).mean())
    assert scores.top5 == pytest.approx((ranks < 5).mean())
    assert scores.loss == pytest.approx(loss.mean(), rel=1e-6)
    assert not model.training
