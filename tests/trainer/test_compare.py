"""Comparisons: means and spread, missing cells, and which runs count."""

import csv
import json
from dataclasses import asdict
from pathlib import Path

import pytest
from PIL import Image

from fractalshards.errors import FractalError
from fractaltrain.compare import collect_runs, write_comparison
from fractaltrain.recipes import FT_RECIPES
from fractaltrain.study import StudyPlan, plan_study, read_study, write_plan

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


ANY = {"recipe": asdict(FT_RECIPES["anderson"]), "classes": 10, "image_size": 16, "precision": "torch.float32"}


def finish(folder: Path, settings, share: float) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"settings": ANY | settings}))
    (folder / "result.json").write_text(json.dumps({"top1": share, "best_top1": min(share + 0.01, 1.0)}))


def finish_loose(folder: Path, row: str, model: str, seed: int, share: float) -> None:
    settings = {"task": "ft", "data": "digits", "per_class": None, "model": model, "seed": seed}
    finish(folder / f"digits--{row}--{model}--seed{seed}", settings, share)


def plan(folder: Path, text: str = STUDY) -> StudyPlan:
    folder.mkdir(exist_ok=True)
    (folder / "s.toml").write_text(text)
    planned = plan_study(read_study(folder / "s.toml"))
    write_plan(planned, folder)
    return planned


def test_compare_runs_outside_of_studies(fractaltrain, tmp_path):
    for row, model, shares in (("small", "a", (0.5, 0.7)), ("scratch", "a", (0.25,)), ("scratch", "b", (0.2, 0.2))):
        for seed, share in enumerate(shares):
            finish_loose(tmp_path, row, model, seed, share)
    found = fractaltrain("compare", tmp_path, "--out", tmp_path / "out")
    table = found.out.removesuffix("\n")
    assert (found.code, found.err.count("\n")) == (0, 1)
    assert "| data | model | scratch | small |" in table
    assert "| digits | a | 25.0 (1) | 60.0 ± 14.1 (2) |" in table
    assert "| digits | b | 20.0 ± 0.0 (2) | missing |" in table
    assert "digits,b,small,1,0,,,," in (tmp_path / "out" / "table.csv").read_text()
    assert (tmp_path / "out" / "table.md").read_text() == table


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("photos-5-per-class-2-from-single-a-anderson-nakashima", "single-anderson-nakashima"),
        ("digits--fractaldb--a--seed0", "fractaldb"),
        ("mine", "mine"),
    ],
)
def test_compare_shortens_default_names_and_knows_moved_data(tmp_path, name, row):
    settings = {"task": "ft", "per_class": 5, "subset_seed": 2, "model": "a", "weights": "f" * 64}
    for seed, place in enumerate(("old", "new")):
        data = {"data": f"imagefolder:{place}/photos", "data_digest": "a1", "seed": seed}
        finish(tmp_path / place / name, settings | data, 0.5)
    assert {run.cell for run in collect_runs([tmp_path]).runs} == {("imagefolder:new/photos, 5 per class", "a", row)}


def test_compare_tells_model_arguments_apart(tmp_path):
    settings = {"task": "ft", "data": "digits", "model": "vit", "seed": 0}
    for size in (4, 8):
        finish(tmp_path / f"patch{size}", settings | {"model_args": {"patch_size": size, "qkv_bias": False}}, 0.5)
    models = [run.cell.model for run in collect_runs([tmp_path]).runs]
    assert sorted(models) == ["vit patch_size=4 qkv_bias=False", "vit patch_size=8 qkv_bias=False"]


def test_compare_shows_planned_cells_in_the_order_of_the_file(tmp_path):
    """Finished: everything from scratch; after single: digits with the first two seeds."""
    for run in plan(tmp_path).finetunings:
        if run.row == "scratch" or (run.row == "single" and run.target == "digits" and run.seed < 2):
            finish(tmp_path / run.run, run.settings, 0.5 + run.seed / 10)
    table = write_comparison(collect_runs([tmp_path]), tmp_path)
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
        assert picture.width > 900
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 50


def test_compare_counts_only_runs_of_the_plan(tmp_path):
    """Not those with other settings, of a seed that was dropped, or after a pre-training with other settings."""
    planned = plan(tmp_path)
    vit = planned.finetunings[0]
    after = next(run for run in planned.finetunings if run.start)
    start = planned.starts[after.start]
    seed1 = next(run for run in planned.finetunings if run.seed == 1)
    for run, share in ((vit, 0.5), (seed1, 0.6), (start, 0.0), (after, 0.9)):
        finish(tmp_path / run.run, run.settings, share)
    finish_loose(tmp_path / "ft", "other", "resnet10t", 0, 0.9)
    assert [run.top1 for run in collect_runs([tmp_path]).runs] == [0.5, 0.6, 0.9]
    plan(tmp_path, STUDY.replace("seeds = [0, 1, 2]", "seeds = [0, 2]"))
    assert [run.top1 for run in collect_runs([tmp_path]).runs] == [0.5, 0.9]
    plan(tmp_path, STUDY.replace('shards = "shards/single"', 'shards = "shards/single"\nepochs = 2'))
    assert [run.top1 for run in collect_runs([tmp_path]).runs] == [0.5, 0.6]
    plan(tmp_path, STUDY.replace("[scratch]", "[scratch]\nepochs = 2"))
    assert [run.top1 for run in collect_runs([tmp_path]).runs] == [0.9]


def test_compare_a_study_with_other_runs(tmp_path):
    run = plan(tmp_path / "study").finetunings[0]
    finish(tmp_path / "study" / run.run, run.settings, 0.5)
    finish_loose(tmp_path / "loose", "mine", "resnet10t", 0, 0.9)
    comparison = collect_runs([tmp_path / "study", tmp_path / "loose"])
    assert comparison.rows == ["scratch", "single", "fractaldb", "mine"]
    assert comparison.targets == ["digits, 10 per class", "digits, 5 per class", "cifar10", "digits"]
    assert sorted(run.top1 for run in comparison.runs) == [0.5, 0.9]


def test_compare_refuses_the_same_run_twice(tmp_path):
    for folder in ("a", "b"):
        finish_loose(tmp_path / folder, "scratch", "resnet10t", 0, 0.5)
    with pytest.raises(FractalError, match="seed0"):
        collect_runs([tmp_path])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("result.json", text) for text in ("", '{"top1": 7}', '{"top1": NaN}')),
        *(("study.json", text) for text in ("", "{}")),
        ("run.json", '{"settings": {"task": "ft", "seed": "x"}}'),
    ],
)
def test_compare_names_damaged_files(fractaltrain, tmp_path, name, text):
    finish_loose(tmp_path, "scratch", "resnet10t", 0, 0.5)
    path = next(iter(tmp_path.rglob("result.json"))).parent / name
    path.write_text(text)
    fractaltrain("compare", tmp_path, "--out", tmp_path / "out").assert_refused(1, f"error: {path}: ")
    assert not (tmp_path / "out").exists()
