"""Studies: reading the file, planning, finding out what is done, and running the rest."""

import hashlib
import json
import shlex
import signal
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest

from fractalshards.errors import FractalError, StoppedError, UsageError
from fractaltrain import run_study as module
from fractaltrain.run_study import DONE, TO_DO, check_models, describe_study, find_datasets, find_state, run_study
from fractaltrain.study import SCRATCH, StudyPlan, StudyRun, plan_study, read_plan, read_study, write_plan

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
subset_seeds = [0, 1]
"""
ONE_SEED = STUDY.replace("seeds = [0, 1]", "seeds = [0]")
FIRST = "pt/small--test_resnet--seed0"

STAND_IN = """
import json, os, pathlib, signal, sys, time
words = sys.argv[1:]
out = pathlib.Path(words[words.index("--out") + 1])
folder, name = out.parent.parent, f"{out.parent.name}/{out.name}"
def note(event):
    with open(folder / "events.txt", "a") as file:
        file.write(f"{event} {name} {' '.join(words)}\\n")
note("start")
behaviour = json.loads((folder / "behaviour.json").read_text()).get(name, "finish")
while behaviour == "meet" and (folder / "events.txt").read_text().count("start") < 2:
    time.sleep(0.005)
if behaviour in ("finish", "meet"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    plan = json.loads((folder / "study.json").read_text())
    settings = {run["run"]: run["settings"] for run in plan["pretrainings"] + plan["finetunings"]}[name]
    out.mkdir(parents=True)
    (out / "run.json").write_text(json.dumps({"settings": settings}))
    (out / "result.json").write_text(json.dumps({"top1": 0.5, "best_top1": 0.5}))
if behaviour in ("SIGTERM", "SIGUSR1"):  # the study gets the signal, and passes it on
    number = getattr(signal, behaviour)
    signal.signal(number, lambda number, frame: sys.exit(75))
    os.kill(os.getppid(), number)
    time.sleep(60)
if behaviour == "SIGINT":  # as at a terminal, where Ctrl-C reaches both
    os.kill(os.getppid(), signal.SIGINT)
note("end")
sys.exit({"fail": 1, "stop": 75, "SIGINT": 130}.get(behaviour, 0))
"""


class Study:
    """A planned study in a folder; a few lines of Python stand in for its runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "s.toml"

    def plan(self, text: str = STUDY) -> StudyPlan:
        self.file.write_text(text, "utf-8-sig")  # with the byte order mark of some editors
        study = read_study(self.file)
        plan = plan_study(study, find_datasets(study)[0])
        write_plan(plan, self.folder)
        return plan

    def run(self, plan: StudyPlan, behaviour: dict[str, str] | None = None, **options) -> list[str]:
        (self.folder / "behaviour.json").write_text(json.dumps(behaviour or {}))
        (self.folder / "events.txt").write_text("")
        return run_study(sum(plan.groups(), ()), plan, self.folder, Path("data"), **options)

    def events(self) -> list[list[str]]:
        """Return "start" or "end", name and arguments of the runs, in order."""
        return [line.split() for line in (self.folder / "events.txt").read_text().splitlines()]

    def started(self) -> list[str]:
        return [name for event, name, *_ in self.events() if event == "start"]


@pytest.fixture
def study(tmp_path, monkeypatch) -> Study:
    monkeypatch.setattr(module, "_COMMAND", (sys.executable, "-ISc", STAND_IN))
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.005)
    (tmp_path / "out").mkdir()
    return Study(tmp_path / "out")


def names(*groups: tuple[StudyRun, ...]) -> list[str]:
    return [run.run for group in groups for run in group]


def test_plan_shares_a_pretraining_among_its_finetunings(study):
    plan = study.plan()
    assert len(plan.pretrainings) == 2
    assert [len(group) for group in plan.groups()] == [4, 4, 5, 5]
    assert len({*names(*plan.groups())}) == 18
    first = plan.groups()[2]
    assert [run.start for run in first] == [None] + 4 * [first[0].run]
    assert first[0].settings["recipe"]["epochs"] == 3
    assert {run.settings["recipe"]["name"] for run in plan.groups()[0]} == {"anderson-scratch"}


def test_plan_applies_later_tables_last(study):
    """Study, model, set, and then what is for one model on one set."""
    text = STUDY.replace("seeds", "finetuning = { lr = 0.5, epochs = 4 }\nseeds", 1)
    own = "finetuning = { lr = 0.6 }\nscratch = { lr = 0.7 }"
    text = text.replace("[models.test_resnet]", f"[models.test_resnet]\n{own}")
    text += "[finetuning.one]\ndata = 'digits'\nlr = 0.8\n[finetuning.other]\ndata = 'digits'\n"
    text += "[models.test_resnet.targets.other]\nfinetuning = { lr = 0.1 }\nscratch = { lr = 0.3 }\n"
    plan = study.plan(text)
    rates = {(run.row, run.target, run.settings["recipe"]["lr"]) for run in plan.finetunings}
    expected = {("small", "digits", 0.6), ("small", "one", 0.8), ("small", "other", 0.1)}
    assert rates == expected | {(SCRATCH, "digits", 0.7), (SCRATCH, "one", 0.7), (SCRATCH, "other", 0.3)}
    assert {run.settings["recipe"]["epochs"] for run in plan.finetunings} == {4}


def test_plan_hands_on_precision_and_model_arguments(study):
    model = 'model = "vit_tiny_patch16_224"\nargs = { patch_size = 8, qkv_bias = false }'
    text = STUDY.replace("[models.test_resnet]", f"[models.vit8]\n{model}").replace("seeds", 'amp = "bf16"\nseeds', 1)
    plan = study.plan(text)
    for run in (*plan.pretrainings, *plan.finetunings):
        command = " ".join(run.arguments)
        assert (run.model, run.settings["model"]) == ("vit8", "vit_tiny_patch16_224")
        assert run.settings["model_args"] == {"patch_size": 8, "qkv_bias": False}
        assert ("--model vit_tiny_patch16_224 --model-arg patch_size=8" in command) == (run.start is None)
        assert ("--amp bf16" in command, run.settings["precision"]) == (True, "torch.bfloat16")
    check_models(plan, 32)


def test_plan_leaves_open_what_follows_the_dataset(study):
    """Crop and normalisation of anderson depend on the kind of dataset, unless the study sets them."""
    assert {"crop", "mean", "std", "hflip"}.isdisjoint(study.plan().pretrainings[0].settings["recipe"])
    plan = study.plan(STUDY.replace("epochs = 3", 'set = { crop = "none" }'))
    assert plan.pretrainings[0].settings["recipe"]["crop"] == "none"


@pytest.mark.parametrize(
    ("old", "new", "noun"),
    [
        ("seeds = ", "seed = ", "`seed`"),
        ("[scratch]", "[scrach]", "scrach"),
        ("epochs = 3", 'recipe = "andersen"', "andersen"),
        ("epochs = 3", 'epochs = "3"', r"\$.pretraining"),
        ("epochs = 3", "set = { lrr = 1 }", "lrr"),
        ("epochs = 3", 'models = ["resnet50"]', "resnet50"),
        ('shards = "shards/small"', "", "shards"),
        ("[pretraining.small]", '[pretraining."../small"]', "../small"),
        ("[pretraining.small]", "[pretraining.scratch]", "scratch"),
        ("[finetuning.digits]", "[finetuning.digitz]", "digitz"),
        ("per_class = [5, 10]", "", "per_class"),
        ("per_class = [5, 10]", "per_class = [0]", "per_class"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "seeds"),
        ("[models.test_resnet]", "", "models"),
        ("[scratch]", "[models.test_resnet.targets.cifar10]\n[scratch]", "cifar10"),
        ("seeds = ", 'amp = "bf8"\nseeds = ', "amp"),
        ("[study]", "[study", "TOML"),
        (STUDY[STUDY.index("[finetuning") :], "", "finetuning"),
        (STUDY[STUDY.index("[scratch]") : STUDY.index("[finetuning")], "", "pretraining"),
        # values that fit each by itself, but not together
        ("epochs = 3", 'recipe = "deit"\n[models.test_vit]\npretraining = { epochs = 4 }', "warmup_epochs"),
    ],
)
def test_read_study_names_file_and_field(tmp_path, old, new, noun):
    path = tmp_path / "s.toml"
    assert old in STUDY
    path.write_text(STUDY.replace(old, new, 1))
    with pytest.raises(UsageError, match=noun) as caught:
        read_study(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["../elsewhere", "/etc", ""])
def test_read_plan_refuses_runs_outside_of_the_folder(study, path):
    name = study.plan().finetunings[0].run
    file = study.folder / "study.json"
    file.write_text(file.read_text().replace(f'"{name}"', f'"{path}"'))
    with pytest.raises(FractalError, match=r"study\.json"):
        read_plan(study.folder)


@pytest.mark.parametrize(
    ("old", "new", "code", "noun"),
    [
        ("test_resnet", "resnet10x", 2, "resnet10x"),
        ("test_resnet", "inception_v3", 2, "inception_v3"),
        ("epochs = 3", 'recipe = "deit"\n[models.resnet50]', 2, "drop path"),
        ("epochs = 3", 'build = "make it"', 1, "[pretraining.small] shards/small: no finished dataset; run make it"),
        ("[finetuning.digits]", '[finetuning.x]\ndata = "shards:none"\n[finetuning.digits]', 1, "[finetuning.x] none"),
    ],
)
def test_mistakes_are_found_before_anything_runs(fractaltrain, tmp_path, dataset, old, new, code, noun):
    text = STUDY.replace(old, new)
    (tmp_path / "s.toml").write_text(text if "build" in new else text.replace("shards/small", str(dataset)))
    command = ("study", tmp_path / "s.toml", "--out", tmp_path / "new")
    fractaltrain(*command).assert_refused(code, str(tmp_path / "s.toml"), noun)
    dry = fractaltrain(*command, "--dry-run")
    assert (dry.code, noun in dry.err) == (2 if code == 2 else 0, True)
    assert not (tmp_path / "new").exists()


def test_dry_run_lists_runs_with_state_and_command(study, caplog):
    """Those with other settings are neither used nor run again."""
    plan = study.plan()
    study.run(plan, {FIRST: "fail"})
    other = plan.pretrainings[1].run
    settings = (study.folder / other / "run.json").read_text()
    (study.folder / other / "run.json").write_text(settings.replace('"epochs": 3', '"epochs": 4'))
    runs = sum(plan.groups(), ())
    *lines, total = describe_study(runs, plan, study.folder, Path("data"))
    assert [line.split(": ")[1] for line in lines[::2]] == 8 * ["done"] + 5 * ["to do"] + 5 * ["not usable"]
    assert f"# {other}: not usable: has recipe.epochs 4, not 3" in lines[2 * 13]
    assert total == "18 runs: 8 done, 5 to do, 5 not usable"
    for line, run in zip(lines[1::2], runs, strict=True):
        assert shlex.split(line) == ["fractaltrain", *run.command(study.folder, Path("data"))]
    assert study.run(plan) == names(plan.groups()[3])
    assert study.started() == names(plan.groups()[2])
    assert "recipe.epochs" in caplog.messages[-1]


def test_failure_stops_only_what_needs_it(study, caplog):
    caplog.set_level("WARNING")  # other tests may have shown notes
    plan = study.plan()
    assert study.run(plan, {FIRST: "fail"}) == names(plan.groups()[2])
    assert len(study.started()) == 4 + 4 + 1 + 5
    assert [FIRST in error for error in caplog.messages] == [True]
    assert study.run(plan, nproc=2, quiet=True) == []
    assert study.started() == names(plan.groups()[2])  # all others are done
    assert {tuple(event[-3:]) for event in study.events()} == {("--nproc", "2", "--quiet")}


def test_jobs_run_at_the_same_time_but_after_their_pretraining(study, caplog):
    caplog.set_level("INFO", "fractaltrain")
    plan = study.plan()
    assert study.run(plan, {plan.pretrainings[0].run: "meet"}, jobs=3) == []
    # pre-trainings first, so that runs from scratch fill the other jobs; by the log: the third may begin before them
    first = [shlex.split(command)[-1] for command in caplog.messages[:2]]
    assert first == [str(study.folder / run.run) for run in plan.pretrainings]
    events = [f"{event} {name}" for event, name, *_ in study.events()]
    running = accumulate(1 if event.startswith("start") else -1 for event in events)
    assert 2 <= max(running) <= 3
    after = [run for run in plan.finetunings if run.start]
    assert all(events.index(f"end {run.start}") < events.index(f"start {run.run}") for run in after)
    assert (study.folder / "log" / f"{FIRST}.txt").exists()


def finish(run: StudyRun, folder: Path, weights: bytes = b"") -> None:
    """Write what a run leaves; ``weights`` are those of a pre-training, or those a fine-tuning starts from."""
    (folder / run.run).mkdir(parents=True, exist_ok=True)
    settings = run.settings if run.target is None else {**run.settings, "weights": hashlib.sha256(weights).hexdigest()}
    (folder / run.run / "checkpoint-0001-0000000.pt").write_bytes(weights)
    (folder / run.run / "run.json").write_text(json.dumps({"settings": settings}))
    (folder / run.run / "result.json").write_text("{}")


def test_moved_dataset_is_the_same_and_a_rebuilt_one_is_not(study, write_dataset, tmp_path):
    dataset = write_dataset(tmp_path / "set", train=(20,))
    text = ONE_SEED.replace("shards/small", str(dataset))
    for run in study.plan(text).groups()[1][:2]:
        finish(run, study.folder)
    moved = study.plan(text.replace(str(dataset), str(dataset.rename(tmp_path / "moved"))))
    assert [find_state(run, moved, study.folder) for run in moved.groups()[1][:2]] == [DONE, DONE]
    write_dataset(dataset, train=(21,))
    plan = study.plan(text)
    first, second = (find_state(run, plan, study.folder) for run in plan.groups()[1][:2])
    assert ("dataset_digest" in first, FIRST in second) == (True, True)


def test_runs_of_other_settings_or_weights_are_noticed(study):
    """But not those that trained nothing."""
    model = '[models.test_resnet]\nmodel = "vit_tiny_patch16_224"\n'
    before, after = (
        study.plan(ONE_SEED.replace("[models.test_resnet]\n", model + args)) for args in ("args = { depth = 2 }\n", "")
    )
    first, second, *_ = before.groups()[1]
    (study.folder / first.run).mkdir(parents=True)
    for file, text in (("run.json", '{"settings": {"task": "other"}}'), ("metrics.jsonl", "")):
        (study.folder / first.run / file).write_text(text)
    assert find_state(first, before, study.folder) == TO_DO
    finish(first, study.folder, b"retrained")
    assert find_state(first, before, study.folder) == DONE
    assert "depth" in find_state(after.pretrainings[0], after, study.folder)
    for weights, state in ((b"old", "weights"), (b"retrained", DONE)):
        finish(second, study.folder, weights)
        assert state in find_state(second, before, study.folder)


@pytest.mark.parametrize(
    ("behaviour", "jobs", "code"), [("stop", 1, 75), ("SIGTERM", 1, 75), ("SIGUSR1", 2, 75), ("SIGINT", 1, 130)]
)
def test_stopped_study_ends_with_its_code_and_continues(study, behaviour, jobs, code):
    plan = study.plan(ONE_SEED)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError) as caught:
        study.run(plan, {plan.finetunings[0].run: behaviour}, jobs=jobs)
    assert caught.value.code == code
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(study.started()) < 9
    assert study.run(plan) == []


def test_run_ends_when_its_study_is_killed():
    program = (
        "import sys; from fractaltrain import run_study as module\n"
        "run = 'import time; print(1, flush=True); time.sleep(99); print(2)'\n"
        "module._COMMAND = (sys.executable, '-c', run)\n"
        "module._start((), None, None).wait()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as study:
        assert study.stdout.readline() == b"1\n"
        study.kill()
        assert study.stdout.read() == b""


def test_study_ends_with_a_comparison(fractaltrain, study, dataset):
    (study.folder / "behaviour.json").write_text(json.dumps(dict.fromkeys(names(*study.plan().groups()), "fail")))
    study.file.write_text(STUDY.replace("shards/small", str(dataset)))
    arguments = ("study", study.file, "--out", study.folder)
    nothing = fractaltrain(*arguments)
    assert nothing.code == 1
    assert "18 runs missing" in nothing.err
    assert not (study.folder / "table.md").exists()
    (study.folder / "behaviour.json").write_text("{}")
    half = fractaltrain(*arguments, "--slice", "1/2")  # both runs of seed 0
    assert half.code == 0
    assert "| digits, 5 per class | test_resnet | 50.0 ± 0.0 (2 of 4) | 50.0 ± 0.0 (2 of 4) |" in half.out
    assert fractaltrain(*arguments, "--quiet").err == ""
    assert (study.folder / "figure.png").exists()


def test_second_study_in_a_folder_is_refused(fractaltrain, study, dataset, hold):
    """Another slice is not."""
    (study.folder / "behaviour.json").write_text("{}")
    study.file.write_text(ONE_SEED.replace("shards/small", str(dataset)))
    arguments = ("study", study.file, "--out", study.folder)
    with hold(study.folder) as process:
        fractaltrain(*arguments).assert_refused(1, str(process.pid))
        assert not (study.folder / "study.json").exists()
        assert fractaltrain(*arguments, "--slice", "1/2").code == 0


@pytest.mark.slow
def test_stopped_study_continues(fractaltrain, tmp_path, dataset, monkeypatch):
    """A real one: a pre-training and fine-tunings, one epoch each."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    brief = "pretraining = { epochs = 1, batch_size = 10 }\nfinetuning = { epochs = 1, batch_size = 50 }\n"
    text = ONE_SEED.replace("[scratch]\n", "").replace("epochs = 3", "").replace("subset_seeds = [0]", "")
    text = text.replace("[study]\n", f"[study]\n{brief}").replace("shards/small", str(dataset))
    (tmp_path / "s.toml").write_text(text)
    out = tmp_path / "real"
    arguments = ("study", str(tmp_path / "s.toml"), "--out", str(out))
    command = [sys.executable, "-m", "fractaltrain", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert any(line.startswith("note: fractaltrain pt ") for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75
    assert not list(out.rglob("result.json"))
    done = fractaltrain(*arguments)
    assert (done.code, "| digits, 10 per class | test_resnet |" in done.out) == (0, True)
    files = {".lock", "pt", "ft", "study.json", "table.csv", "table.md", "figure.png"}
    assert {path.name for path in out.iterdir()} == files
