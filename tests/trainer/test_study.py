"""Studies: what a file says, the steps that come of it, what they cost, and how they are run."""

import hashlib
import json
import shlex
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from fractalshards.console import as_quiet_as
from fractalshards.errors import UsageError
from fractalshards.slices import Slice
from fractaltrain.comparison.collect import gather
from fractaltrain.data.finetuning import DataChoice, open_data
from fractaltrain.run_folder import append_metrics
from fractaltrain.study import run
from fractaltrain.study.config import read_study
from fractaltrain.study.cost import KNOWN, Cost, Size, Total, find_sizes, find_speeds, step_cost
from fractaltrain.study.forecast import describe
from fractaltrain.study.lineage import find_digests, outdated
from fractaltrain.study.plan import plan_study
from fractaltrain.study.record import read_record, write_record

STUDY = """
[study]
image_size = 16
seeds = [0, 1]
[models.test_resnet]
[scratch]
[pretraining.small]
shards = "shards/small"
epochs = 3
[finetuning.digits]
per_class = [5, 10]
subset_seeds = [0, 1, 2]
"""
DIGITS = STUDY[STUDY.index("[finetuning.digits]") :]


def planned(folder, text=STUDY):
    """The study that a text says, and its groups."""
    (folder / "s.toml").write_text(text)
    study = read_study(folder / "s.toml")
    return study, plan_study(study, folder, folder)


class Runner:
    """Takes the place of the processes: writes what a finished run has, unless its folder contains ``failing``.

    Of those that run at once, the last one ends first.
    """

    def __init__(self, folder: Path, groups, failing: str = "never") -> None:
        self._settings = {str(folder / step.run): step.settings for group in groups for step in group.steps()}
        self._failing = failing
        self._ended: list[tuple[str, int]] = []
        self.ran: list[str] = []
        self.arguments: list[tuple[str, ...]] = []
        self.most = 0

    @property
    def running(self) -> int:
        return len(self._ended)

    def start(self, name, arguments, log=None) -> None:
        out = arguments[arguments.index("--out") + 1]
        self.ran.append(Path(out).name)
        self.arguments.append(arguments)
        code = 1 if self._failing in out else 0
        if not code:
            finish(Path(out), self._settings[out])
        self._ended.append((name, code))
        self.most = max(self.most, self.running)

    def wait(self) -> tuple[str, int]:
        return self._ended.pop()


def finish(folder: Path, settings, top1: float = 0.5) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    (folder / "result.json").write_text(json.dumps({"top1": top1, "best_top1": top1}))


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


def test_a_failure_stops_only_what_needs_it(tmp_path, monkeypatch, capsys):
    _, groups = planned(tmp_path)
    runner = Runner(tmp_path, groups, failing="pt/small--test_resnet--seed0")
    monkeypatch.setattr(run, "step_processes", lambda threads: nullcontext(runner))
    missing = run.run_groups(groups, tmp_path, nproc=None)
    assert missing == [step.run for step in groups[2].steps()]
    assert len(runner.ran) == 6 + 6 + 1 + 7
    assert "pt/small--test_resnet--seed0: failed with exit code 1; going on" in capsys.readouterr().err

    runner = Runner(tmp_path, groups)
    monkeypatch.setattr(run, "step_processes", lambda threads: nullcontext(runner))
    assert run.run_groups(groups, tmp_path, nproc=2) == []
    assert runner.ran == [Path(step.run).name for step in groups[2].steps()]  # all others are done


def test_a_run_of_other_settings_is_neither_used_nor_run_again(tmp_path, monkeypatch, capsys):
    study, groups = planned(tmp_path)
    for step in (step for group in groups for step in group.steps()):
        finish(tmp_path / step.run, step.settings)
    write_record(study, groups, tmp_path)
    assert gather([tmp_path]).runs
    study, changed = planned(tmp_path, STUDY.replace("epochs = 3", "epochs = 4").replace("[scratch]", ""))
    runner = Runner(tmp_path, changed)
    monkeypatch.setattr(run, "step_processes", lambda threads: nullcontext(runner))
    missing = run.run_groups(changed, tmp_path, nproc=None)
    assert missing == [step.run for group in changed for step in group.steps()]
    assert runner.ran == []
    assert "holds a run with recipe.epochs 3, not 4; remove it, or choose another --out" in capsys.readouterr().err
    write_record(study, changed, tmp_path)
    assert not gather([tmp_path]).runs


def test_what_starts_from_another_pretraining_is_not_done(tmp_path, monkeypatch, capsys):
    _, groups = planned(tmp_path)
    for step in (step for group in groups for step in group.steps()):
        finish(tmp_path / step.run, step.settings)
    _, changed = planned(tmp_path, STUDY.replace("epochs = 3", "epochs = 4"))
    assert all(standing.done for group in changed[:2] for standing in run.standings(group, tmp_path))
    assert not any(standing.done for group in changed[2:] for standing in run.standings(group, tmp_path))
    monkeypatch.setattr(run, "step_processes", lambda threads: nullcontext(Runner(tmp_path, changed)))
    run.run_groups(changed, tmp_path, nproc=None)
    *problems, last = capsys.readouterr().err.splitlines()
    assert last == f"{tmp_path}: done already: 12 of 26 steps"
    pretraining = "pt/small--test_resnet--seed0"
    assert problems[0].startswith(f"{tmp_path}/{pretraining}: holds a run with recipe.epochs 3, not 4; remove it")
    assert problems[1].endswith(f": starts from {pretraining}, which is not usable; remove it, too")
    assert len(problems) == 14
    told = "\n".join(describe(changed, tmp_path, KNOWN, {}))
    assert f"# {pretraining}: not usable: holds a run with recipe.epochs 3, not 4; remove it" in told


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_steps_at_once(tmp_path, monkeypatch, jobs):
    """No more than asked for, a fine-tuning only after its pre-training has ended, and all of them."""
    _, groups = planned(tmp_path)
    runner = Runner(tmp_path, groups, failing="pt/small--test_resnet--seed0")
    monkeypatch.setattr(run, "step_processes", lambda threads: nullcontext(runner))
    missing = run.run_groups(groups, tmp_path, None, jobs)
    assert missing == [step.run for step in groups[2].steps()]
    assert len(set(runner.ran)) == len(runner.ran) == 6 + 6 + 1 + 7
    assert runner.most == jobs


def test_quiet_steps_of_a_quiet_study(tmp_path, monkeypatch, capsys):
    _, groups = planned(tmp_path)
    runner = Runner(tmp_path, groups)
    monkeypatch.setattr(run, "step_processes", lambda threads: nullcontext(runner))
    with as_quiet_as(True):
        assert run.run_groups(groups, tmp_path, None, jobs=2) == []
    assert capsys.readouterr() == ("", "")
    assert all(arguments[-1] == "--quiet" for arguments in runner.arguments)


def test_a_dataset_that_was_built_again_is_noticed(tmp_path, write_dataset, monkeypatch, capsys):
    """By both: the pre-training on it, and the fine-tuning from it, which is run again with it."""
    dataset = write_dataset(tmp_path / "set", train=(20,))
    text = STUDY.replace("shards/small", str(dataset))
    (tmp_path / "s.toml").write_text(text)
    asked = read_study(tmp_path / "s.toml")

    def plan():
        return plan_study(asked, tmp_path, Path("data"), find_digests(asked))

    groups = plan()
    monkeypatch.setattr(run, "step_processes", lambda threads: nullcontext(Runner(tmp_path, groups)))
    assert run.run_groups(groups, tmp_path, None) == []
    shutil.rmtree(dataset)
    write_dataset(dataset, train=(21,))
    missing = run.run_groups(plan(), tmp_path, None)
    assert missing == [step.run for group in plan() if group.pretraining for step in group.steps()]
    said = capsys.readouterr().err
    assert "the dataset that it was trained on was built again, with other content; remove it" in said


def test_weights_that_were_trained_again_are_noticed(tmp_path):
    finish(tmp_path / "pt", {})
    finish(tmp_path / "ft", {"weights": hashlib.sha256(b"first").hexdigest()})
    weights = tmp_path / "pt" / "checkpoint-00000001-00000000.pt"
    assert outdated(tmp_path, "ft", "pt") is None  # no checkpoint is left to tell by
    weights.write_bytes(b"first")
    assert outdated(tmp_path, "ft", "pt") is None
    weights.with_name("new").write_bytes(b"second")
    weights.with_name("new").rename(weights)
    problem = outdated(tmp_path, "ft", "pt")
    assert problem == f"began from other weights than {tmp_path / 'pt'} has now, which was trained again; remove it"
    assert outdated(tmp_path, "ft", None) is None


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


def test_the_comparison_is_left_out_only_if_nothing_is_finished(fractaltrain, tmp_path, dataset, monkeypatch):
    (tmp_path / "s.toml").write_text(STUDY.replace("shards/small", str(dataset)))
    out = tmp_path / "out"
    asked = read_study(tmp_path / "s.toml")
    groups = plan_study(asked, out, Path("data"), find_digests(asked))
    monkeypatch.setattr(run, "step_processes", lambda threads: nullcontext(Runner(out, groups, failing="/")))
    outcome = fractaltrain("study", tmp_path / "s.toml", "--out", out)
    assert outcome.code == 1
    assert "26 steps missing" in outcome.err
    assert not (out / "table.md").exists()
    monkeypatch.setattr(run, "step_processes", lambda threads: nullcontext(Runner(out, groups, failing="--seed1")))
    outcome = fractaltrain("study", tmp_path / "s.toml", "--out", out, "--slice", "1/2")  # both of seed 0
    assert outcome.code == 0
    assert "| digits, 5 per class | test_resnet | 50.0 ± 0.0 (3 of 6) | 50.0 ± 0.0 (3 of 6) |" in outcome.out
    outcome = fractaltrain("study", tmp_path / "s.toml", "--out", out)
    assert outcome.code == 1
    assert "13 steps missing" in outcome.err
    assert (out / "figure.png").exists()
