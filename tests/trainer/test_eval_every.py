"""``--eval-every``: fewer looks at held-out images change nothing but what is known of them."""

import json
from pathlib import Path

import pytest

from fractaltrain.config import Running
from fractaltrain.recipes import PT_RECIPES
from fractaltrain.recipes.recipe import change
from fractaltrain.train import is_evaluated


@pytest.mark.parametrize(("every", "evaluated"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (5, [4]), (9, [4])])
def test_the_last_epoch_is_evaluated_whatever_the_number(every, evaluated):
    recipe = change(PT_RECIPES["anderson"], {"epochs": "5"})
    running = Running(recipe, Path("run"), seed=0, pad=False, amp="fp32", workers=0, save_every_minutes=1.0,
                      resume="auto", eval_every=every)  # fmt: skip
    assert [epoch for epoch in range(5) if is_evaluated(epoch, running)] == evaluated


def test_training_is_the_same_and_a_run_continues_with_another_number(fractaltrain, dataset, tmp_path):
    arguments = ("pt", "--shards", dataset, "--model", "test_resnet", "--image-size", 16, "--batch-size", 10)
    assert fractaltrain(*arguments, "--out", tmp_path / "all", "--epochs", 3).code == 0
    assert fractaltrain(*arguments, "--out", tmp_path / "few", "--epochs", 3, "--eval-every", 2).code == 0
    everything, few = (epochs_of(tmp_path / name) for name in ("all", "few"))
    assert [line["train_loss"] for line in few] == [line["train_loss"] for line in everything]
    assert ["top1" in line for line in everything] == [True, True, True]
    assert ["top1" in line for line in few] == [False, True, True]
    assert [line["top1"] for line in few[1:]] == [line["top1"] for line in everything[1:]]
    result = json.loads((tmp_path / "few" / "result.json").read_text())
    assert result["best_epoch"] in (2, 3)
    assert result["best_top1"] == max(line["top1"] for line in few[1:])
    assert (tmp_path / "few" / "history.png").exists()
    (tmp_path / "few" / "result.json").unlink()
    again = fractaltrain(*arguments, "--out", tmp_path / "few", "--epochs", 3, "--eval-every", 3)
    assert (again.code, again.err) == (0, "")


def epochs_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train_loss" in line]
