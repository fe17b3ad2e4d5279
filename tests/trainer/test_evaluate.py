"""Predictions, metrics, and the command ``eval``."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fractaltrain.cli import _print_classes
from fractaltrain.data.source import InMemorySource
from fractaltrain.evaluate import Predictions, predict
from fractaltrain.optim import multi_label_loss
from fractaltrain.plotting import draw_confusion
from fractaltrain.recipes import PT_RECIPES
from fractaltrain.run_folder import list_checkpoints
from tiny_training import ALONE

SMALL = ("--image-size", 16, "--batch-size", 24, "--epochs", 1)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_single_label_scores_by_hand():
    predicted = np.array([[0, 1], [1, 0], [1, 0], [2, 1]])
    predictions = Predictions(classes=4, labels=np.array([0, 0, 1, 1]), predicted=predicted, loss=0.5)
    assert predictions.scores() == {"samples": 4, "loss": 0.5, "top1": 0.5, "top5": 1.0}
    nothing = {"samples": 0, "top1": None, "top5": None}
    assert predictions.class_scores() == [{"samples": 2, "top1": 0.5, "top5": 1.0}] * 2 + [nothing] * 2
    assert predictions.confusion().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0] * 4, [0] * 4]


def test_multi_label_scores_by_hand():
    """Class 0: its two images are ranked first and third: (1 + 2/3) / 2. Class 1: first: 1. Class 2: no image."""
    logits = np.array([[3, 0, -1], [2, -1, -1], [1, -2, -1], [-1, -3, 1]], np.float32)
    shown = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]], np.bool_)
    predictions = Predictions(3, shown, logits, loss=2.0)
    assert predictions.average_precisions() == pytest.approx([(1 + 2 / 3) / 2, 1, np.nan], nan_ok=True)
    # 3 of 12 pairs are shown: the loss adds log 4 = 1.39 to logits; two of class 0 are above it, one of them shown
    f1 = 2 * 1 / (2 + 3)
    scores = predictions.scores()
    assert scores == {"samples": 4, "loss": 2.0, "map": pytest.approx((5 / 6 + 1) / 2), "f1": pytest.approx(f1)}
    assert [entry["samples"] for entry in predictions.class_scores()] == [2, 1, 0]
    nothing = Predictions(2, np.zeros((2, 2), np.bool_), np.zeros((2, 2), np.float32), 0.0)
    assert (nothing.scores()["map"], nothing.scores()["f1"]) == (0, 0)


def test_rare_class_is_predicted_only_above_its_prior():
    """1000 classes, one shown per image."""
    shown = np.eye(10, 1000, dtype=np.bool_)
    prior = np.log(1 / 999) + np.log(1000)  # the logit of a model that knows nothing
    logits = np.full((10, 1000), prior, np.float32)
    assert Predictions(1000, shown, logits, 0.0).scores()["f1"] == 0
    logits[shown] += 10
    assert Predictions(1000, shown, logits, 0.0).scores()["f1"] == 1


def test_multi_label_loss_weighs_shown_classes_per_image():
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


class Table(nn.Module):
    """Returns the row of a table of logits that the first pixel selects."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits[(images[:, 0, 0, 0] * 255).round().long()]


@pytest.mark.parametrize(("classes", "batch"), [(10, 7), (10, 64), (3, 5)])
def test_predict_counts_every_sample_once(classes, batch):
    count = 53
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(count, classes)).astype(np.float32)
    labels = generator.integers(0, classes, count)
    images = np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 8, 8, 3))
    recipe = PT_RECIPES["anderson"]
    source = InMemorySource("table", images, labels, classes)
    model = Table(torch.from_numpy(logits))
    predictions = predict(model, source, recipe, 8, torch.float32, batch, False, ALONE)
    assert predictions is not None
    ranks = (logits > logits[np.arange(count), labels][:, None]).sum(1)
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(count), labels]
    expected = {"samples": count, "loss": loss.mean(), "top1": (ranks < 1).mean(), "top5": (ranks < 5).mean()}
    assert predictions.scores() == pytest.approx(expected, rel=1e-6)
    assert not model.training


def test_eval_leaves_out_the_images_a_run_was_finetuned_on(fractaltrain):
    common = ("--data", "digits", "--per-class", 3, "--subset-seed", 4)
    fractaltrain("ft", "--weights", "none", "--model", "test_resnet", *SMALL, *common, "--out", "run")
    result = json.loads(Path("run/result.json").read_text())
    done = fractaltrain("eval", "--weights", "run", "--data", "digits")
    assert done.code == 0
    report = json.loads(Path("run/eval-digits/eval.json").read_text())
    assert [report[name] for name in ("samples", "top1", "top5")] == [1767, result["top1"], result["top5"]]
    assert report["loss"] == pytest.approx(result["loss"], rel=1e-5)
    assert [entry["name"] for entry in report["classes"]] == list("0123456789")
    assert np.trace(report["confusion"]) == round(report["top1"] * 1767)
    assert f"top-1 {report['top1']:.2%}  top-5 {report['top5']:.2%}" in done.out
    with Image.open("run/eval-digits/confusion.png") as picture:
        assert min(picture.size) > 500


def test_eval_refuses_other_classes(fractaltrain, dataset, image_folder):
    fractaltrain("pt", "--shards", dataset, "--model", "test_resnet", *SMALL, "--out", "pt")
    done = fractaltrain("eval", "--weights", "pt", "--data", f"shards:{dataset}", "--quiet")
    assert (done.code, done.err) == (0, "")
    [folder] = Path("pt").glob("eval-small-*")
    assert json.loads((folder / "eval.json").read_text())["samples"] == 13
    outcome = fractaltrain("eval", "--weights", "pt", "--data", "digits")
    assert (outcome.code, outcome.err.count("\n"), "5 classes" in outcome.err) == (1, 1, True)
    assert not Path("pt/eval-digits").exists()

    for name, classes in (("animals", ("ant", "bee")), ("plants", ("ant", "oak"))):
        for part in ("train", "val"):
            image_folder(Path(name) / part, dict.fromkeys(classes, 2))
    few = ("--model", "test_resnet", "--image-size", 16, "--batch-size", 2, "--epochs", 1, "--out", "ft")
    fractaltrain("ft", "--weights", "none", "--data", "imagefolder:animals", *few)
    assert fractaltrain("eval", "--weights", "ft", "--data", "imagefolder:animals").code == 0
    outcome = fractaltrain("eval", "--weights", "ft", "--data", "imagefolder:plants")
    assert (outcome.code, "bee" in outcome.err, "oak" in outcome.err) == (1, True, True)


def test_eval_of_a_diverged_run_has_no_scores(fractaltrain, dataset, read_only_disk):
    arguments = ("pt", "--shards", dataset, "--model", "test_resnet", *SMALL, "--out", "run")
    assert fractaltrain(*arguments).code == 0
    options = ("eval", "--weights", "run", "--data", f"shards:{dataset}")
    refused = fractaltrain(*options, "--out", read_only_disk / "new")  # before anything is evaluated
    assert (refused.code, refused.err.count("\n"), str(read_only_disk) in refused.err) == (1, 1, True)
    [path] = list_checkpoints(Path("run"))
    saved = torch.load(path, weights_only=True)
    saved["model"]["fc.bias"][2] = torch.nan
    torch.save(saved, path)
    outcome = fractaltrain(*options, "--quiet")
    assert (outcome.code, outcome.out, outcome.err.count("\n"), "nan" in outcome.err) == (1, "", 1, True)


@pytest.mark.parametrize("classes", [2, 100, 5000])
def test_confusion_is_drawn_for_few_and_many_classes(tmp_path, classes):
    labels = np.random.default_rng(0).integers(0, classes, 1000)
    counts = Predictions(classes, labels, labels[:, None], 0.0).confusion()
    with warnings.catch_warnings(action="error"):
        draw_confusion(tmp_path / "x.png", counts, classes, ["$a 類_$ " + "long " * 20] * classes, "run $x$")
    with Image.open(tmp_path / "x.png") as picture:
        assert 400 < min(picture.size) < 2500


def test_best_and_worst_of_many_classes_are_printed(capsys):
    _print_classes([{"class": label, "samples": 120, "top1": label / 120, "top5": 1.0} for label in range(120)])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [int(row.split()[0]) for row in rows] == [*range(10), *range(110, 120)]
