"""``fractaltrain ft`` and ``eval``: on shards, from timm's weights, with a frozen backbone; metrics by hand."""

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from fractalshards import reader as stored
from fractalshards.manifest import load_manifest
from fractaltrain.checkpoint import load_checkpoint, load_run
from fractaltrain.cli import _print_classes
from fractaltrain.config import ImagesConfig
from fractaltrain.data.images import open_data
from fractaltrain.data.source import InMemorySource
from fractaltrain.evaluate import Predictions, predict
from fractaltrain.optim import multi_label_loss
from fractaltrain.plotting import draw_confusion
from fractaltrain.recipes import PT_RECIPES
from fractaltrain.run_folder import list_checkpoints
from tiny_training import ALONE

pytestmark = pytest.mark.usefixtures("elsewhere")
BRIEF = ("--batch-size", 10, "--epochs", 1)
SMALL = ("--model", "test_resnet", "--image-size", 16, *BRIEF)


def test_per_class_subset_reads_no_images(dataset, monkeypatch):
    monkeypatch.setattr(stored, "parse_sample", lambda *arguments: pytest.fail("an image was read"))
    data = open_data(ImagesConfig(f"shards:{dataset}", 3, 0, Path("unused")), ALONE)
    monkeypatch.undo()
    labels = [data.train.read(index).label for index in range(sum(data.train.lengths))]
    assert np.bincount(labels).tolist() == [3] * 5


@pytest.mark.parametrize(
    ("train", "val", "label_type", "noun"),
    [(20, 0, "single", "val"), (3, 5, "single", "class 3"), (20, 3, "single", "class 3"), (20, 5, "multi", "classes")],
)
def test_shards_that_cannot_be_finetuned_on_are_refused(fractaltrain, write_dataset, train, val, label_type, noun):
    info = write_dataset(Path("shards"), train=(train,), val=val) / "_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"label_type": label_type}))
    fractaltrain("ft", "--weights", "none", *SMALL, "--data", "shards:shards").assert_refused(1, "error: shards", noun)


def test_frozen_finetuning_and_another_one_on_shards(fractaltrain, dataset, pretrained):
    data = ("--data", f"shards:{dataset}", "--quiet", "--out")
    for start, out, freeze in ((pretrained, "once", ("--freeze", "backbone")), ("once", "twice", ())):
        done = fractaltrain("ft", "--weights", start, *BRIEF, *freeze, *data, out)
        assert (done.code, done.err, done.out.count("\n")) == (0, "", 2)  # the results only
    before, after = (load_checkpoint(folder).state["model"] for folder in (pretrained, Path("once")))
    changed = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert changed == ["fc.weight", "fc.bias"]  # not even the statistics of batch norm
    result = json.loads(Path("twice/result.json").read_text())
    done = fractaltrain("eval", "--weights", "twice", *data, "report")
    assert (done.code, done.err) == (0, "")
    evaluated = json.loads(Path("report/eval.json").read_text())
    assert (result["samples"], evaluated["top1"]) == (13, result["top1"])
    assert fractaltrain("export", "twice", "--out", "export").code == 0
    card = Path("export/README.md").read_text()
    manifest = load_manifest(dataset)
    digests = (manifest.recipe_digest, manifest.content_digest(), load_run(pretrained).sha256)
    assert [digest for digest in digests if digest not in card] == []
    assert card.count("Fine-tuned") == 2


def test_finetuning_notices_other_weights_and_skips_damaged_ones(fractaltrain, pretrained):
    start = shutil.copytree(pretrained, Path("pt"))
    finetune = ("ft", "--data", "digits", "--per-class", 2, "--batch-size", 20, "--epochs", 1, "--out", "ft")
    assert fractaltrain(*finetune, "--weights", pretrained).code == 0
    *_, before, newest = list_checkpoints(start)
    newest.write_bytes(newest.read_bytes()[:1000])
    refused = fractaltrain(*finetune, "--weights", start)
    assert (refused.code, "weights" in refused.err) == (1, True)
    outcome = fractaltrain(*finetune, "--weights", start, "--out", "other")
    first, second = outcome.out.splitlines()[:2]
    assert (outcome.code, newest.name in first, "after 1 epoch" in second) == (0, True, True)
    before.unlink()
    newest.unlink()
    fractaltrain(*finetune, "--weights", start).assert_refused(1, "checkpoint")


def replace_download(monkeypatch, download):
    """Make timm call a function with the model whose published weights it would download."""
    create = timm.create_model

    def fetch(name: str, pretrained: bool = False, **options: int) -> nn.Module:
        model = create(name, **options)
        return download(model) if pretrained else model

    monkeypatch.setattr(timm, "create_model", fetch)


def test_timm_weights_are_loaded(fractaltrain, monkeypatch):
    made = []
    replace_download(monkeypatch, lambda model: made.append(model) or model)
    data = ("--data", "digits", "--per-class", 2, "--lr", 1e-12)
    done = fractaltrain("ft", "--weights", "timm", *SMALL, *data)
    assert (done.code, done.err) == (0, "")
    assert "test_resnet.r160_in1k" in done.out
    assert done.out.count("fc.weight, fc.bias") == 2
    run = Path("runs/digits-2-per-class-0-from-timm-test_resnet-anderson")
    assert json.loads((run / "run.json").read_text())["settings"]["weights"] == "timm:test_resnet.r160_in1k"
    start = load_checkpoint(run).state["model"]["conv1.0.weight"]
    assert torch.allclose(start, made[0].state_dict()["conv1.0.weight"], atol=1e-6)


def test_timm_weights_without_internet_are_one_line(fractaltrain, monkeypatch):
    def fail(model: nn.Module) -> nn.Module:
        raise ConnectionError("name resolution failed\nand much more")

    replace_download(monkeypatch, fail)
    outcome = fractaltrain("ft", "--weights", "timm", *SMALL, "--data", "digits")
    outcome.assert_refused(1, "test_resnet.r160_in1k", "HF_HUB_OFFLINE=1")


# Evaluation


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


def test_multi_label_loss_weighs_shown_classes_per_image():
    logits = torch.tensor([[0.0, 1.0, -1.0, 2.0], [0.5, 0.0, 0.0, 0.0]])
    targets = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    weights = torch.tensor([[4 / 2], [4 / 1]])  # classes over those that an image shows
    terms = weights * targets * (logits.exp().log1p() - logits) + (1 - targets) * logits.exp().log1p()
    assert float(multi_label_loss(logits, targets)) == pytest.approx(float(terms.mean()))


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
    source = InMemorySource("table", images, labels, classes)
    model = Table(torch.from_numpy(logits))
    predictions = predict(model, source, PT_RECIPES["anderson"], 8, torch.float32, batch, ALONE)
    assert predictions is not None
    ranks = (logits > logits[np.arange(count), labels][:, None]).sum(1)
    loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(count), labels]
    expected = {"samples": count, "loss": loss.mean(), "top1": (ranks < 1).mean(), "top5": (ranks < 5).mean()}
    assert predictions.scores() == pytest.approx(expected, rel=1e-6)
    assert not model.training


def test_eval_leaves_out_the_images_a_run_was_finetuned_on(fractaltrain):
    data = ("--data", "digits", "--per-class", 3, "--subset-seed", 4, "--batch-size", 24)
    run = Path(os.fsdecode(b"run\xff"))  # a name that is not UTF-8
    fractaltrain("ft", "--weights", "none", *SMALL, *data, "--out", run)
    result = json.loads((run / "result.json").read_text())
    done = fractaltrain("eval", "--weights", run, "--data", "digits")
    assert done.code == 0
    report = json.loads((run / "eval-digits" / "eval.json").read_text())
    assert [report[name] for name in ("samples", "top1", "top5")] == [1767, result["top1"], result["top5"]]
    assert report["loss"] == pytest.approx(result["loss"], rel=1e-5)
    assert [entry["name"] for entry in report["classes"]] == list("0123456789")
    assert np.trace(report["confusion"]) == round(report["top1"] * 1767)
    assert f"top-1 {report['top1']:.2%}  top-5 {report['top5']:.2%}" in done.out
    with Image.open(run / "eval-digits" / "confusion.png") as picture:
        assert min(picture.size) > 500
    assert {path.name for path in run.iterdir()} >= {"history.png", "tb"}
    assert fractaltrain("compare", run, "--out", run / "table").code == 0


def test_eval_refuses_other_classes(fractaltrain, pretrained, image_folder):
    fractaltrain("eval", "--weights", pretrained, "--data", "digits").assert_refused(1, "5 classes")
    assert not (pretrained / "eval-digits").exists()
    for part in ("train", "val"):  # as many classes as in the pre-training
        image_folder(Path("letters") / part, dict.fromkeys("abcde", 2))
    run = shutil.copytree(pretrained, Path("rendered"))
    content = json.loads((run / "run.json").read_text())
    content["settings"]["dataset_recipe"] = {"kind": "single", "systems_digest": "0"}
    (run / "run.json").write_text(json.dumps(content))
    fractaltrain("eval", "--weights", run, "--data", "imagefolder:letters").assert_refused(1, "letters")
    for name, classes in (("animals", ("ant", "bee")), ("plants", ("ant", "oak"))):
        for part in ("train", "val"):
            image_folder(Path(name) / part, dict.fromkeys(classes, 2))
    ants = ("--data", "imagefolder:animals")
    fractaltrain("ft", "--weights", "none", *SMALL, "--batch-size", 2, *ants, "--out", "ft")
    assert fractaltrain("eval", "--weights", "ft", *ants).code == 0
    fractaltrain("eval", "--weights", "ft", "--data", "imagefolder:plants").assert_refused(1, "bee", "oak")


def test_eval_of_a_diverged_run_has_no_scores(fractaltrain, dataset, pretrained, read_only_disk):
    run = shutil.copytree(pretrained, Path("run"))
    options = ("eval", "--weights", run, "--data", f"shards:{dataset}")
    refused = fractaltrain(*options, "--out", read_only_disk / "new")  # before anything is evaluated
    refused.assert_refused(1, str(read_only_disk))
    newest = list_checkpoints(run)[-1]
    saved = torch.load(newest, weights_only=True)
    saved["model"]["fc.bias"][2] = torch.nan
    torch.save(saved, newest)
    fractaltrain(*options, "--quiet").assert_refused(1, "nan")


@pytest.mark.parametrize(("classes", "name"), [(10, "7"), *((n, "$a 類_$ " + "long " * 20) for n in (2, 100, 5000))])
def test_confusion_is_drawn_for_few_and_many_classes(tmp_path, classes, name):
    labels = np.random.default_rng(0).integers(0, classes, 1000)
    counts = Predictions(classes, labels, labels[:, None], 0.0).confusion()
    with warnings.catch_warnings(action="error"):
        draw_confusion(tmp_path / "x.png", counts, classes, [name] * classes, "run $x$")
    with Image.open(tmp_path / "x.png") as picture:
        assert 400 < min(picture.size) < 2500
        assert np.asarray(picture.convert("L"))[:, [0, 1, -2, -1]].min() == 255  # nothing is cut off


def test_best_and_worst_of_many_classes_are_printed(capsys):
    _print_classes([{"class": label, "samples": 120, "top1": label / 120, "top5": 1.0} for label in range(120)])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [int(row.split()[0]) for row in rows] == [*range(10), *range(110, 120)]
