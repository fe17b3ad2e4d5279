from pathlib import Path

import pytest

from fractaltrain.checkpoint import Position
from fractaltrain.trained import describe_origin


@pytest.mark.parametrize(
    ("position", "passed_over", "told"),
    [
        (Position(2), (), "weights of runs/x after 2 epochs"),
        (Position(1, 5), (), "weights of runs/x after 1 epoch and 5 steps of the next"),
        (Position(1), ("c.pt: damaged",), "c.pt: damaged; taking the one before\nweights of runs/x after 1 epoch"),
    ],
)
def test_unfinished_epochs_and_damaged_checkpoints_are_told(position, passed_over, told):
    assert describe_origin(Path("runs/x"), position, passed_over) == told
