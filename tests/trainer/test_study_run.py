"""Studies: how their steps are run, skipped and refused, and what is told of it."""

import hashlib
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from fractalshards.console import as_quiet_as
from fractaltrain import study as run
from fractaltrain.compare import gather
from fractaltrain.study import KNOWN, describe, find_digests, outdated, plan_study, read_study, write_record
from planned_study import STUDY, Runner, finish, planned


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
