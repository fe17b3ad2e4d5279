import json
import shutil
from pathlib import Path

import pytest

from fractalshards.errors import FractalError
from fractaltrain.checkpoint import Position, describe_origin, load_trained


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


@pytest.mark.parametrize(
    ("figure", "value"), [("crop", "middle"), ("mean", [0.5, 0.5]), ("std", "wide"), ("epochs", 1.5), ("lr", None)]
)
def test_figures_that_no_recipe_can_have_are_refused(tiny_run, tmp_path, figure, value):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    run["settings"] |= {"model": "test_resnet", "classes": 10}
    (folder / "run.json").write_text(json.dumps(run))
    before = load_trained(folder).recipe
    assert json.loads(json.dumps(vars(before))) == run["settings"]["recipe"]
    run["settings"]["recipe"][figure] = value
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(FractalError, match=r"run\.json: its recipe cannot be read \(.*; train it again"):
        load_trained(folder)
