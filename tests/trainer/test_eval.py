"""``fractaltrain eval``: what it prints and writes, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fractaltrain import evaluate_run
from fractaltrain.evaluate import Tally, draw_confusion

SMALL = ("--image-size", 16, "--batch-size", 25, "--epochs", 1)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_scores_by_hand():
    guesses = np.array([[0, 1], [1, 0], [1, 0], [2, 1]])
    tally = Tally(classes=4, labels=np.array([0, 0, 1, 1]), guesses=guesses, loss_sum=2.0)
    assert (tally.top1, tally.top5, tally.loss) == (0.5, 1.0, 0.5)
    assert [tuple(score) for score in tally.by_class()] == [
        (0, 2, 0.5, 1.0),
        (1, 2, 0.5, 1.0),
        (2, 0, None, None),
        (3, 0, None, None),
    ]
    assert tally.confusion().tolist() == [[1, 1, 0, 0], [0, 1, 1, 0], [0] * 4, [0] * 4]


def test_a_finetuned_run(fractaltrain):
    common = ("--data", "digits", "--per-class", 3, "--subset-seed", 4)
    fractaltrain("ft", "--weights", "none", "--model", "test_resnet", *SMALL, *common, "--out", "run")
    result = json.loads(Path("run/result.json").read_text())
    done = fractaltrain("eval", "--weights", "run", "--data", "digits")
    assert done.code == 0
    assert "evaluating: 1,767 / 1,767 images" in done.err
    report = json.loads(Path("run/eval-digits/eval.json").read_text())
    assert {name: report[name] for name in ("samples", "top1", "top5")} == {
        name: result[name] for name in ("samples", "top1", "top5")
    }  # without the 30 that it was trained on
    assert report["samples"] == 1767
    assert report["loss"] == pytest.approx(result["loss"], rel=1e-5)
    assert [entry["name"] for entry in report["classes"]] == list("0123456789")
    assert np.trace(report["confusion"]) == round(report["top1"] * 1767)
    assert f"top-1 {report['top1']:.2%}  top-5 {report['top5']:.2%}" in done.out
    with Image.open("run/eval-digits/confusion.png") as picture:
        assert min(picture.size) > 500


def test_a_pretraining_run_on_its_own_classes(fractaltrain, dataset):
    fractaltrain("pt", "--shards", dataset, "--model", "test_resnet", *SMALL, "--out", "run")
    done = fractaltrain("eval", "--weights", "run", "--data", f"shards:{dataset}", "--quiet")
    assert (done.code, done.err) == (0, "")
    [folder] = Path("run").glob("eval-small-*")
    assert json.loads((folder / "eval.json").read_text())["samples"] == 13

    outcome = fractaltrain("eval", "--weights", "run", "--data", "digits")
    assert outcome.code == 1
    assert "run: its classifier knows 5 classes, but digits has 10; evaluate on what it was" in outcome.err
    assert not Path("run/eval-digits").exists()


def test_classes_of_the_same_number_but_other_names(fractaltrain, image_folder):
    for folder, names in (("animals", ("ant", "bee")), ("plants", ("ant", "oak"))):
        for part in ("train", "val"):
            image_folder(Path(folder) / part, dict.fromkeys(names, 2))
    common = ("--model", "test_resnet", "--image-size", 16, "--batch-size", 2, "--epochs", 1, "--out", "run")
    fractaltrain("ft", "--weights", "none", "--data", "imagefolder:animals", *common)
    assert fractaltrain("eval", "--weights", "run", "--data", "imagefolder:animals").code == 0
    outcome = fractaltrain("eval", "--weights", "run", "--data", "imagefolder:plants")
    assert outcome.code == 1
    assert "run: its class 1 is bee, but that of imagefolder:plants is oak; evaluate on" in outcome.err


@pytest.mark.parametrize("classes", [2, 100, 5000])
def test_pictures_of_few_and_many_classes(tmp_path, classes):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, 1000)
    tally = Tally(classes, labels, labels[:, None], 0.0)
    names = ["$a class_$ " + "long " * 20] * classes
    draw_confusion(tmp_path / "x.png", tally.confusion(), classes, names, "run $x$")
    with Image.open(tmp_path / "x.png") as picture:
        assert 400 < min(picture.size) < 2500


def test_of_many_classes_only_the_ends_of_the_list_are_printed(tmp_path, capsys):
    """Class k of 120 has 120 images, k of them guessed right."""
    labels = np.repeat(np.arange(120), 120)
    right = np.tile(np.arange(120), 120) < labels
    first = np.where(right, labels, (labels + 1) % 120)
    guesses = np.stack([(first + shift) % 120 for shift in range(5)], axis=1)
    evaluate_run._print(Tally(120, labels, guesses, loss_sum=1.0), (), tmp_path)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    worst, best = lines.index("the worst ten"), lines.index("the best ten")
    shown = [int(line.split()[0]) for line in lines[worst + 2 : best]]
    assert shown == list(range(10))
    assert [int(line.split()[0]) for line in lines[best + 2 : best + 12]] == list(range(119, 109, -1))
    assert f"all 120 classes: {tmp_path / 'eval.json'}" in lines
