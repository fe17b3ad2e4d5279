import numpy as np
import pytest
import torch
from torch import nn

from fractaltrain.data.source import ArraySource
from fractaltrain.distributed import World
from fractaltrain.evaluate import MultiLabelScores, average_precisions, evaluate, micro_f1, multi_label_scores
from fractaltrain.optim import multi_label_loss
from fractaltrain.recipes import PT_RECIPES
from fractaltrain.stream.loader import Batches, Loading, iterate
from fractaltrain.stream.order import evaluation_positions
from fractaltrain.transforms import evaluation_geometry

ALONE = World(rank=0, size=1, local_size=1, device=torch.device("cpu"))


class Remembers(nn.Module):
    """Reads from the first pixel which row of a table its logits are."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[(images[:, 0, 0, 0] * 255).round().long()]


def test_scores_of_several_classes_by_hand():
    """Class 0: the two images that show it come first and third: (1 + 2/3) / 2. Class 1: first: 1. Class 2: nowhere."""
    logits = np.array([[3, 0, -1], [2, -1, -1], [1, -2, -1], [-1, -3, 1]], np.float32)
    shown = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]], np.bool_)
    assert average_precisions(logits, shown) == pytest.approx([(1 + 2 / 3) / 2, 1, np.nan], nan_ok=True)
    scores = multi_label_scores(logits, shown, 2.0, average_precisions(logits, shown))
    assert scores == MultiLabelScores(4, 0.5, pytest.approx(((1 + 2 / 3) / 2 + 1) / 2), micro_f1(logits, shown))
    # 12 places, 3 shown: 1.39 is what the weight of 4 adds, and two logits of class 0 are above, one of them rightly
    assert micro_f1(logits, shown) == pytest.approx(2 * 1 / (2 + 3))
    assert micro_f1(np.zeros((2, 2), np.float32), np.zeros((2, 2), np.bool_)) == 0


def test_guesses_of_rare_classes_are_rare():
    """1000 classes of which images show one: a class that is certain to be there is guessed, a possible one is not."""
    shown = np.eye(10, 1000, dtype=np.bool_)
    prior = np.log(1 / 999) + np.log(1000)  # what the loss teaches where nothing is known
    logits = np.full((10, 1000), prior, np.float32)
    assert micro_f1(logits, shown) == 0
    logits[shown] += 10
    assert micro_f1(logits, shown) == 1


def test_loss_of_several_classes_weighs_the_shown_ones_per_image():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0], [0.5, 0.0, 0.0, 0.0]])
    targets = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    softplus = [[np.log1p(np.exp(x)) for x in row] for row in logits.tolist()]
    expected = 0.0
    for row, (shown, all_logits) in enumerate(zip(targets.tolist(), logits.tolist(), strict=True)):
        weight = 4 / sum(shown)
        for column, one in enumerate(shown):
            term = softplus[row][column] - all_logits[column] if one else softplus[row][column]
            expected += (weight if one else 1) * term
    assert float(multi_label_loss(logits, targets)) == pytest.approx(expected / 8)


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
        evaluation_geometry(PT_RECIPES["anderson"], 8),
        evaluation_positions(count, batch, 0, 1),
        np.arange(count),
        seed=0,
        epoch=0,
    )
    model = Remembers(torch.from_numpy(logits))
    loaded = iterate(batches, 0, Loading(workers=0, pin_memory=False))
    scores = evaluate(model, loaded, PT_RECIPES["anderson"], torch.float32, False, ALONE)
    ranks = (logits > logits[np.arange(count), labels][:, None]).sum(1)
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(count), labels]
    assert scores.samples == count
    assert scores.top1 == pytest.approx((ranks < 1).mean())
    assert scores.top5 == pytest.approx((ranks < 5).mean())
    assert scores.loss == pytest.approx(loss.mean(), rel=1e-6)
    assert not model.training
