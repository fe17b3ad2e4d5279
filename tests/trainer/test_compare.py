"""Comparisons: means and spread, what is missing, and which runs count."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from fractalshards.errors import FractalError
from fractaltrain.compare import Score, gather
from fractaltrain.comparison.write import write_comparison
from fractaltrain.study import plan_study, read_study, write_record

STUDY = """
[study]
image_size = 16
seeds = [0, 1, 2]
[models.vit_tiny_patch16_224]
[models.resnet10t]
[scratch]
[pretraining.single]
shards = "shards/single"
[pretraining.fractaldb]
shards = "shards/fractaldb"
models = ["resnet10t"]
[finetuning.digits]
per_class = [10, 5]
[finetuning.cifar10]
"""


def finish(folder: Path, settings, share: float) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    (folder / "result.json").write_text(json.dumps({"top1": share, "best_top1": min(share + 0.01, 1.0)}))


def loose(folder: Path, row: str, model: str, seed: int, share: float) -> None:
    settings = {"task": "ft", "data": "digits", "per_class": None, "model": model, "seed": seed}
    finish(folder / f"digits--{row}--{model}--seed{seed}", settings, share)


@pytest.fixture
def groups(tmp_path):
    """Of a study in ``tmp_path`` whose plan is written and of which nothing is done."""
    return plan(tmp_path, STUDY)


def plan(folder: Path, text: str):
    (folder / "s.toml").write_text(text)
    study = read_study(folder / "s.toml")
    groups = plan_study(study, folder, folder)
    write_record(study, groups, folder)
    return groups


def test_means_and_spread_by_hand():
    assert Score.of([0.5, 0.7, 0.9]) == Score(3, pytest.approx(70), pytest.approx(20))
    assert Score.of([0.25]) == Score(1, 25, None)


def test_loose_runs(fractaltrain, tmp_path):
    for row, model, shares in (("small", "a", (0.5, 0.7)), ("scratch", "a", (0.25,)), ("scratch", "b", (0.2, 0.2))):
        for seed, share in enumerate(shares):
            loose(tmp_path, row, model, seed, share)
    told = fractaltrain("compare", tmp_path, "--out", tmp_path / "out")
    table = told.out.removesuffix("\n")
    assert (told.code, told.err) == (0, f"{tmp_path / 'out'}: table.csv, table.md, figure.png\n")
    assert "| data | model | scratch | small |" in table
    assert "| digits | a | 25.0 (1) | 60.0 ± 14.1 (2) |" in table
    assert "| digits | b | 20.0 ± 0.0 (2) | missing |" in table
    assert "digits,b,small,1,0,,,," in (tmp_path / "out" / "table.csv").read_text()
    assert (tmp_path / "out" / "table.md").read_text() == table


def test_planned_cells_in_the_order_of_the_file(tmp_path, groups):
    """Done: all from scratch, and of what was pre-trained on single images the first two seeds on digits."""
    for group in groups:
        for step in group.finetunings:
            if step.pretraining == "scratch" or (step.pretraining, step.target, step.seed < 2) == (
                "single", "digits", True,
            ):  # fmt: skip
                finish(tmp_path / step.run, step.settings, 0.5 + step.seed / 10)
    table = write_comparison(gather([tmp_path]), tmp_path)
    assert table.splitlines()[:8] == [
        "| data | model | scratch | single | fractaldb |",
        "|---|---|---:|---:|---:|",
        "| digits, 10 per class | vit_tiny_patch16_224 | 60.0 ± 10.0 (3) | 55.0 ± 7.1 (2 of 3) | – |",
        "| digits, 10 per class | resnet10t | 60.0 ± 10.0 (3) | 55.0 ± 7.1 (2 of 3) | missing |",
        "| digits, 5 per class | vit_tiny_patch16_224 | 60.0 ± 10.0 (3) | 55.0 ± 7.1 (2 of 3) | – |",
        "| digits, 5 per class | resnet10t | 60.0 ± 10.0 (3) | 55.0 ± 7.1 (2 of 3) | missing |",
        "| cifar10 | vit_tiny_patch16_224 | 60.0 ± 10.0 (3) | missing | – |",
        "| cifar10 | resnet10t | 60.0 ± 10.0 (3) | missing | missing |",
    ]
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert len(rows) == 3 * (2 + 3)
    assert rows[1] == {
        "data": "digits, 10 per class", "model": "vit_tiny_patch16_224", "pretraining": "single", "planned": "3",
        "n": "2", "top1": "55.0000", "top1_std": "7.0711", "best_top1": "56.0000", "best_top1_std": "7.0711",
    }  # fmt: skip
    with Image.open(tmp_path / "figure.png") as picture:
        assert picture.width > 1200
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 50


def test_only_runs_of_the_plan_count(tmp_path, groups):
    """Neither one of other settings, nor one of a seed that was dropped, nor one after an older pre-training."""
    scratch, pretrained = groups[0].finetunings[0], next(group for group in groups if group.pretraining)
    finish(tmp_path / scratch.run, scratch.settings, 0.5)
    finish(tmp_path / groups[1].finetunings[0].run, groups[1].finetunings[0].settings, 0.6)
    finish(tmp_path / pretrained.pretraining.run, pretrained.pretraining.settings, 0.0)
    finish(tmp_path / pretrained.finetunings[0].run, pretrained.finetunings[0].settings, 0.9)
    loose(tmp_path / "ft", "other", "resnet10t", 0, 0.9)
    assert [run.top1 for run in gather([tmp_path]).runs] == [0.5, 0.6, 0.9]
    plan(tmp_path, STUDY.replace("seeds = [0, 1, 2]", "seeds = [0, 2]"))
    assert [run.top1 for run in gather([tmp_path]).runs] == [0.5, 0.9]
    plan(tmp_path, STUDY.replace('shards = "shards/single"', 'shards = "shards/single"\nepochs = 2'))
    assert [run.top1 for run in gather([tmp_path]).runs] == [0.5, 0.6]
    plan(tmp_path, STUDY.replace("[scratch]", "[scratch]\nepochs = 2"))
    assert [run.top1 for run in gather([tmp_path]).runs] == [0.9]


def test_a_study_beside_loose_runs(tmp_path, groups):
    (tmp_path / "study").mkdir()
    for name in ("study.json", "s.toml"):
        (tmp_path / name).rename(tmp_path / "study" / name)
    step = groups[0].finetunings[0]
    finish(tmp_path / "study" / step.run, step.settings, 0.5)
    loose(tmp_path / "loose", "mine", "resnet10t", 0, 0.9)
    comparison = gather([tmp_path / "study", tmp_path / "loose"])
    assert comparison.rows == ("scratch", "single", "fractaldb", "mine")
    assert comparison.targets == ("digits, 10 per class", "digits, 5 per class", "cifar10", "digits")
    assert sorted(run.top1 for run in comparison.runs) == [0.5, 0.9]


def test_the_same_run_twice_is_refused(tmp_path):
    for folder in ("a", "b"):
        loose(tmp_path / folder, "scratch", "resnet10t", 0, 0.5)
    with pytest.raises(FractalError, match="are the same cell with the same seeds; leave one out"):
        gather([tmp_path])


def test_nothing_to_compare(fractaltrain, tmp_path):
    outcome = fractaltrain("compare", tmp_path, "--out", tmp_path / "out")
    assert (outcome.code, outcome.err) == (
        1, f"error: {tmp_path}: no finished fine-tuning run; check the path\n",
    )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"top1": "much"}', '{"top1": 7}', '{"top1": NaN}', '{"top1": tru'])
def test_a_damaged_result_is_named(fractaltrain, tmp_path, text):
    loose(tmp_path, "scratch", "resnet10t", 0, 0.5)
    [path] = tmp_path.rglob("result.json")
    path.write_text(text)
    outcome = fractaltrain("compare", tmp_path, "--out", tmp_path / "out")
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {path}: ")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("text", ["", "{}", '{"rows": 3}'])
def test_a_damaged_plan_is_named(fractaltrain, tmp_path, text):
    (tmp_path / "study.json").write_text(text)
    outcome = fractaltrain("compare", tmp_path, "--out", tmp_path / "out")
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {tmp_path / 'study.json'}: ")
    assert outcome.err.count("\n") == 1
