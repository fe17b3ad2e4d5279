"""Studies: what a file says, the steps that come of it, what they cost, and what is known before any is run."""

import json
import shlex
from pathlib import Path

import pytest

from fractalshards.errors import UsageError
from fractalshards.slices import Slice
from fractaltrain.data.images import DataChoice, open_data
from fractaltrain.run_folder import append_metrics
from fractaltrain.study import (
    KNOWN,
    Cost,
    Size,
    Total,
    describe,
    find_digests,
    find_sizes,
    find_speeds,
    plan_study,
    read_record,
    read_study,
    step_cost,
    write_record,
)
from planned_study import STUDY, finish, planned

DIGITS = STUDY[STUDY.index("[finetuning.digits]") :]


def test_a_pretraining_is_shared_by_its_finetunings(tmp_path):
    _, groups = planned(tmp_path)
    assert [bool(group.pretraining) for group in groups] == [False, False, True, True]
    assert all(len(group.finetunings) == 6 for group in groups)
    runs = [step.run for group in groups for step in group.finetunings]
    assert len(set(runs)) == 24
    assert groups[2].pretraining.settings["recipe"]["epochs"] == 3
    assert {step.settings["recipe"]["name"] for step in groups[0].finetunings} == {"anderson-scratch"}


def test_random_weights_of_a_model_may_be_trained_otherwise(tmp_path):
    own = "[models.test_resnet]\nfinetuning = { lr = 0.1 }\nscratch = { lr = 0.3 }"
    _, groups = planned(tmp_path, STUDY.replace("[models.test_resnet]", own))
    rates = {(bool(group.pretraining), step.settings["recipe"]["lr"]) for group in groups for step in group.finetunings}
    assert rates == {(False, 0.3), (True, 0.1)}


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds", "seed", r"\[study\] has no field 'seed', did you mean 'seeds'"),
        ("[scratch]", "[scrach]", "has no field 'scrach', did you mean 'scratch'"),
        ("epochs = 3", 'recipe = "andersen"', "recipe is 'andersen', did you mean 'anderson'"),
        ("epochs = 3", "epochs = 0", "epochs is 0, but must be at least 1"),
        ("epochs = 3", "set = { lrr = 1 }", r"\[pretraining.small\] unknown parameter 'lrr', did you mean 'lr'"),
        ("epochs = 3", "set = 3", r"\[pretraining.small.set\] must be a table"),
        ("epochs = 3", 'models = ["resnet50"]', "names the model 'resnet50'"),
        ("epochs = 3", "models = 3", "models is 3, but must be a list of texts"),
        ('shards = "shards/small"', "", r"\[pretraining.small\] needs shards"),
        ('shards = "shards/small"', "shards = 3", "shards is 3, but must be a text"),
        (
            "[pretraining.small]",
            '[pretraining."../small"]',
            r"\[pretraining\] '../small' cannot be part of a file's name",
        ),
        ("[pretraining.small]", "[pretraining.scratch]", r"is no pre-training; write \[scratch\]"),
        ("[finetuning.digits]", "[finetuning.digitz]", "data is 'digitz', did you mean 'digits'"),
        ("per_class = [5, 10]", "", "subset_seeds goes with per_class only"),
        ("per_class = [5, 10]", "per_class = [5, 5]", "must be a list of different whole numbers"),
        ("per_class = [5, 10]", "per_class = [0]", "must be a whole number of at least 1"),
        ("seeds = [0, 1]", "seeds = [true]", "must be a whole number of at least 0"),
        ("image_size = 16", "", "needs image_size"),
        ("[models.test_resnet]", "", r"needs a table \[models.NAME\]"),
        ("[study]", "[study", "not valid TOML"),
        (DIGITS, "", r"needs a table \[finetuning.NAME\]"),
    ],
)
def test_what_is_wrong_in_a_file(tmp_path, old, new, words):
    (tmp_path / "s.toml").write_text(STUDY.replace(old, new, 1))
    with pytest.raises(UsageError, match=words) as caught:
        read_study(tmp_path / "s.toml")
    assert str(tmp_path / "s.toml") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_slices_share_out_the_groups(tmp_path, parts):
    _, groups = planned(tmp_path)
    shares = [Slice(index, parts).of(groups) for index in range(1, parts + 1)]
    runs = [step.run for share in shares for group in share for step in group.steps()]
    assert sorted(runs) == sorted(step.run for group in groups for step in group.steps())
    assert len(set(runs)) == len(runs)


def test_the_plan_is_written_down(tmp_path):
    study, groups = planned(tmp_path)
    write_record(study, groups, tmp_path / "out")
    record = read_record(tmp_path / "out")
    assert (record.rows, record.models, record.targets) == (("scratch", "small"), ("test_resnet",), ("digits",))
    steps = [step for group in groups for step in group.finetunings]
    assert [run.run for run in record.finetunings] == [step.run for step in steps]
    last = record.finetunings[-1]
    assert (last.row, last.model, last.target, last.per_class, last.seed, last.subset_seed) == (
        "small", "test_resnet", "digits", 10, 1, 2,
    )  # fmt: skip
    assert last.start.run == "pt/small--test_resnet--seed1"
    assert record.finetunings[0].start is None


@pytest.mark.parametrize("place", ["../elsewhere", "/etc", ""])
def test_a_plan_that_leads_out_of_its_folder_is_refused(tmp_path, place):
    study, groups = planned(tmp_path)
    write_record(study, groups, tmp_path)
    content = json.loads((tmp_path / "study.json").read_text())
    content["finetunings"][0]["run"] = place
    (tmp_path / "study.json").write_text(json.dumps(content))
    with pytest.raises(Exception, match="is not inside the study's folder"):
        read_record(tmp_path)


def test_cost_by_hand(tmp_path):
    """Scratch: 7 epochs of 50 and of 100 images; pre-training: 3 epochs of 200 images."""
    _, groups = planned(tmp_path, STUDY.replace("[scratch]", "[scratch]\nepochs = 7"))
    sizes = {**KNOWN, "shards:shards/small": Size(10, 200)}
    costs = [step_cost(step, sizes, {"test_resnet": 50.0}) for step in groups[0].steps()]
    assert costs == [Cost(350, 7.0)] * 3 + [Cost(700, 14.0)] * 3
    assert step_cost(groups[2].pretraining, sizes, {}) == Cost(600, None)
    assert step_cost(groups[2].pretraining, KNOWN, {"test_resnet": 50.0}) == Cost(None, None)
    assert Total.of([Cost(350, 7.0), Cost(600, None), Cost(None, None)]) == Total(3, 950, 1, 7.0, 2)


def test_known_sizes_are_those_of_the_data():
    digits = open_data(DataChoice("digits", None, 0, Path("unused")), None).training
    assert KNOWN["digits"] == Size(digits.classes, sum(digits.lengths))


def test_sizes_of_datasets_on_this_machine(tmp_path, dataset):
    text = STUDY.replace("shards/small", str(dataset)) + f'[finetuning.own]\ndata = "shards:{dataset}"\n'
    study, groups = planned(tmp_path, text)
    sizes = find_sizes(study)
    assert step_cost(groups[2].pretraining, sizes, {}) == Cost(150, None)
    assert sizes[f"shards:{dataset}"] == Size(5, 50)


def test_folders_that_are_called_like_known_data_are_not_taken_for_them(tmp_path, write_dataset, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("digits"), train=(20,))
    study, _ = planned(tmp_path, STUDY.replace("shards/small", "digits"))
    groups = plan_study(study, tmp_path, Path("data"), find_digests(study))
    images = [step_cost(step, find_sizes(study), {}).images for step in groups[2].steps()]
    assert images[:2] == [3 * 20, 150 * 50]
    assert "dataset_digest" in groups[2].pretraining.settings
    assert "data_digest" not in groups[2].finetunings[0].settings


def test_dry_run_tells_what_is_done_and_what_the_rest_costs(tmp_path):
    study, groups = planned(tmp_path, STUDY.replace("[scratch]", "[scratch]\nepochs = 7"))
    first = groups[0].finetunings[0]
    finish(tmp_path / first.run, first.settings)
    for speed in (40.0, 100.0, 50.0):
        append_metrics(tmp_path / first.run, {"split": "train", "global_step": 1, "images_per_s": speed})
    speeds = find_speeds(groups, tmp_path, 16)
    assert speeds == {"test_resnet": 50.0}
    assert find_speeds(groups, tmp_path, 32) == {}
    lines = list(describe(groups, tmp_path, find_sizes(study), speeds))
    table = [line.split("  ") for line in lines[:5]]
    assert [[cell.strip() for cell in row if cell.strip()] for row in table][1] == [
        "scratch", "test_resnet", "0", "5 of 6", "2,800", "0:00:56",
    ]  # fmt: skip
    total = next(line for line in lines if "steps to do" in line)
    assert total.startswith("25 of 26 steps to do; images: ")
    assert "and 2 unknown steps" in total
    commands = [shlex.split(line) for line in lines if line.startswith("fractaltrain ")]
    assert commands == [["fractaltrain", *step.arguments] for group in groups for step in group.steps()]
    assert f"# {first.run}: done; images: 350, training: 0:00:07" in lines


def test_a_model_that_there_is_not_is_found_before_anything_runs(fractaltrain, tmp_path, dataset):
    text = STUDY.replace("shards/small", str(dataset)).replace("test_resnet", "resnet10x")
    (tmp_path / "s.toml").write_text(text)
    for options in ((), ("--dry-run",)):
        outcome = fractaltrain("study", tmp_path / "s.toml", "--out", tmp_path / "out", *options)
        assert outcome.code == 2
        assert outcome.err.startswith(f"error: {tmp_path / 's.toml'}: [models.resnet10x] no model 'resnet10x'")
        assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_a_model_cannot_follow_is_found_before_anything_runs(fractaltrain, tmp_path):
    (tmp_path / "s.toml").write_text(STUDY.replace("test_resnet", "resnet50").replace("epochs = 3", 'recipe = "deit"'))
    outcome = fractaltrain("study", tmp_path / "s.toml", "--dry-run")
    assert outcome.code == 2
    assert "[models.resnet50] resnet50 has no drop path" in outcome.err


def test_a_dataset_that_is_missing_is_found_before_anything_runs(fractaltrain, tmp_path):
    (tmp_path / "s.toml").write_text(
        STUDY.replace("shards/small", str(tmp_path / "none")).replace("epochs = 3", 'build = "make it"')
    )
    advice = f"[pretraining.small] {tmp_path / 'none'}: no finished dataset; run make it\n"
    outcome = fractaltrain("study", tmp_path / "s.toml", "--out", tmp_path / "out")
    assert (outcome.code, outcome.err) == (1, f"error: {tmp_path / 's.toml'}: {advice}")
    outcome = fractaltrain("study", tmp_path / "s.toml", "--out", tmp_path / "out", "--dry-run")
    assert (outcome.code, outcome.err) == (0, f"note: {advice}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["shards", "imagefolder"])
def test_fine_tuning_images_that_are_missing_are_found_before_anything_runs(fractaltrain, tmp_path, dataset, prefix):
    own = f'[finetuning.own]\ndata = "{prefix}:{tmp_path}/none"\n'
    (tmp_path / "s.toml").write_text(STUDY.replace("shards/small", str(dataset)) + own)
    outcome = fractaltrain("study", tmp_path / "s.toml", "--out", tmp_path / "out")
    assert outcome.code == 1
    assert f"{tmp_path / 's.toml'}: [finetuning.own] {tmp_path / 'none'}" in outcome.err
    assert not (tmp_path / "out").exists()


def test_figures_of_two_tables_that_do_not_go_together_name_the_run(tmp_path):
    text = STUDY.replace("epochs = 3", 'recipe = "deit"').replace("[study]", "[study]\npretraining = { epochs = 4 }")
    with pytest.raises(UsageError, match=r"^pt/small--test_resnet--seed0, recipe deit: warmup_epochs is 5"):
        planned(tmp_path, text)
