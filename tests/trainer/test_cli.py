import json
import subprocess
import sys
from pathlib import Path

import pytest

from fractaltrain.cli import resolve
from fractaltrain.recipes import PT_RECIPES

NO_TORCH = "import sys; sys.modules['torch'] = None; from fractaltrain.cli import main; main({arguments!r})"


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)


def test_help_does_not_wait_for_torch(tmp_path):
    code = "import sys; from fractaltrain import cli; assert not {'torch', 'timm', 'sklearn'} & set(sys.modules)"
    assert python(code, tmp_path).returncode == 0


@pytest.mark.parametrize("arguments", [["pt", "--shards", "x"], ["ft", "--weights", "none", "--data", "digits"]])
def test_without_torch_the_extra_is_named(tmp_path, arguments):
    done = python(NO_TORCH.format(arguments=arguments), tmp_path)
    assert done.returncode == 1
    advice = "run pip install '.[train]' in a clone of the project"
    expected = f"error: training needs torch, which is not installed; {advice}\n"
    assert (done.stdout, done.stderr) == ("", expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pt", "Missing option '--shards'"),
        ("pt --shards x --recipe diet", "'diet' is not one of 'anderson', 'deit'"),
        ("pt --shards x --set lr", "--set lr: expected NAME=VALUE"),
        ("pt --shards x --set lerning=1", "unknown parameter 'lerning'"),
        ("pt --shards x --batch-size many", "batch_size=many: expected an integer"),
        ("pt --shards x --epochs 0", "epochs is 0, but must be at least 1"),
        ("pt --shards x --nproc 0", "--nproc"),
        ("pt --shards x --workers 999", "999 is not in the range 0<=x<=128"),
        ("pt --shards x --nproc 3", "3 processes cannot share a batch of 64 equally; choose --batch-size 63"),
        (
            "ft --weights none --data digits --nproc 2 --accumulate 3",
            "--accumulate 3",
        ),
        ("pt --shards x --image-size 9999999", "9999999 is not in the range 8<=x<=4096"),
        ("ft --data digits", "Missing option '--weights'"),
        ("ft --weights none --data mnist", "'mnist' is none of digits, cifar10, cifar100, imagefolder:PATH"),
        ("ft --weights none --data imagefolder:", "is none of digits"),
        ("ft --weights runs/x --model resnet50 --data digits", "--model goes with --weights none or timm only"),
        ("ft --weights none --freeze backbone --data digits", "--freeze goes with weights that were trained"),
        ("ft --weights none --data shards:", "is none of digits"),
        ("ft --weights none --data digits --image-size 9999999", "9999999 is not in the range 8<=x<=4096"),
        ("eval --data digits", "Missing option '--weights'"),
        ("export runs/x --out x.pt", "--out x.pt: timm knows such files by their ending, .safetensors; add it"),
    ],
)
def test_wrong_usage(fractaltrain, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    outcome = fractaltrain(*arguments.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("pt --shards nowhere", 1, "nowhere: no such folder; fix the path, or build a dataset there"),
        ("pt --shards DATASET/_info.json", 1, "_info.json: a file; give the folder of a dataset"),
        ("pt --shards DATASET --model resnet51", 2, "no model 'resnet51'; did you mean resnet5"),
        ("pt --shards DATASET --model test_resnet --batch-size 51", 2, "larger than the 50 training samples"),
        ("pt --shards DATASET --model test_resnet --batch-size 5 --amp fp16", 2, "--amp fp16 needs a GPU"),
        ("ft --weights nowhere --data digits", 1, "nowhere: no run.json, so not the folder of a run"),
        ("ft --weights none --model test_resnet --data shards:nowhere", 1, "nowhere: no such folder"),
        (
            "ft --weights timm --model deit_small_patch32_224 --data digits",
            2,
            "timm publishes no weights of deit_small",
        ),
        ("eval --weights nowhere --data digits", 1, "nowhere: no run.json, so not the folder of a run"),
        ("export nowhere --out x.safetensors", 1, "nowhere: no run.json, so not the folder of a run"),
        ("ft --weights none --model test_resnet --data imagefolder:nowhere", 1, "nowhere/train: no such folder"),
        ("ft --weights none --model test_resnet --data digits --per-class 180", 1, "lower --per-class"),
        ("ft --weights none --model test_resnet --data digits --per-class 5", 2, "larger than the 50 training samples"),
        ("pt --shards DATASET --model test_resnet --batch-size 5 --out /proc/nowhere", 1, "/proc/nowhere: "),
    ],
)
def test_failures_are_one_line(fractaltrain, tmp_path, monkeypatch, dataset, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    outcome = fractaltrain(*arguments.replace("DATASET", str(dataset)).split())
    assert outcome.code == code
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not list(tmp_path.rglob("*.pt"))


def test_pretrain_then_finetune(fractaltrain, tmp_path, monkeypatch, dataset):
    """The two commands of the README in small, with everything the user will look at."""
    monkeypatch.chdir(tmp_path)
    common = ("--batch-size", 25, "--image-size", 16)
    done = fractaltrain("pt", "--shards", dataset, "--model", "test_resnet", *common, "--epochs", 2)
    assert (done.code, done.err) == (0, "")
    run = Path("runs/small-test_resnet-anderson")
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert settings["recipe"] | {"epochs": 2, "batch_size": 25, "lr": 0.1} == settings["recipe"]
    assert (settings["model"], settings["classes"], settings["image_size"]) == ("test_resnet", 5, 16)
    assert json.loads((run / "result.json").read_text())["samples"] == 13  # the val split
    result = done.out.splitlines()[-2:]
    again = fractaltrain("pt", "--shards", dataset, "--model", "test_resnet", *common, "--epochs", 2)
    assert (again.code, again.out.splitlines()) == (0, [f"{run}: was finished already", *result])

    digits = ("--data", "digits", "--per-class", 3, "--batch-size", 25, "--epochs", 1)
    done = fractaltrain("ft", "--weights", run, *digits)
    assert (done.code, done.err) == (0, "")
    assert f"weights of {run} after 2 epochs: " in done.out
    assert "not loaded: fc.weight, fc.bias; new: fc.weight, fc.bias" in done.out
    run = Path("runs/digits-3-per-class-0-from-small-test_resnet-anderson-anderson")
    result = json.loads((run / "result.json").read_text())
    assert result["samples"] == 1767
    assert 0 <= result["top1"] <= result["top5"] <= 1
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert (settings["image_size"], settings["classes"]) == (16, 10)
    assert "top-1" in done.out

    done = fractaltrain("ft", "--weights", "none", "--model", "test_resnet", *digits, "--image-size", 16)
    assert (done.code, done.err) == (0, "")
    run = Path("runs/digits-3-per-class-0-test_resnet-anderson-scratch")
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert (settings["recipe"]["lr"], settings["weights"]) == (0.15, None)


def test_quiet_says_what_came_out_and_nothing_else(fractaltrain, tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    common = ("--batch-size", 25, "--image-size", 16, "--epochs", 2, "--quiet")
    done = fractaltrain("pt", "--shards", dataset, "--model", "test_resnet", "--out", "run", *common)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("run: 2 epochs done, training loss ")
    assert done.out.count("\n") == 2
    frozen = ("--freeze", "backbone", "--out", "probe")
    done = fractaltrain("ft", "--weights", "run", "--data", "digits", "--per-class", 3, *frozen, *common)
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 2)
    assert "probe: top-1 " in done.out


def test_finetuning_notices_that_the_weights_have_changed(fractaltrain, tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    common = ("--batch-size", 20, "--image-size", 16, "--epochs", 1)
    for seed in (0, 1):
        fractaltrain("pt", "--shards", dataset, "--model", "test_resnet", *common, "--seed", seed, "--out", f"pt{seed}")
    finetune = ("--data", "digits", "--per-class", 2, *common, "--out", "ft")
    assert fractaltrain("ft", "--weights", "pt0", *finetune).code == 0
    outcome = fractaltrain("ft", "--weights", "pt1", *finetune)
    assert outcome.code == 1
    assert "ft: holds a run with weights" in outcome.err


@pytest.mark.parametrize(
    ("options", "lr"), [({}, 0.1), ({"scale_lr": True}, 0.2), ({"lr": "0.3", "scale_lr": True}, 0.6)]
)
def test_learning_rate_follows_the_batch_only_when_told_to(options, lr):
    defaults = {"changes": ("epochs=3",), "epochs": None, "batch_size": "128", "lr": None, "scale_lr": False}
    recipe = resolve(PT_RECIPES["anderson"], {**defaults, **options})
    assert (recipe.lr, recipe.batch_size, recipe.epochs) == (pytest.approx(lr), 128, 3)


def test_finetuning_takes_the_newest_sound_checkpoint(fractaltrain, tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    common = ("--batch-size", 20, "--image-size", 16)
    fractaltrain("pt", "--shards", dataset, "--model", "test_resnet", *common, "--epochs", 2, "--out", "pt")
    finetune = ("ft", "--weights", "pt", "--data", "digits", "--per-class", 2, *common, "--epochs", 1, "--out", "ft")
    before, newest = sorted(Path("pt").glob("checkpoint-*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    outcome = fractaltrain(*finetune)
    assert outcome.code == 0
    first, second = outcome.out.splitlines()[:2]
    assert first.startswith(f"{newest}: damaged (")
    assert first.endswith("; taking the one before")
    assert second.startswith("weights of pt after 1 epoch: ")
    before.unlink()
    newest.unlink()
    outcome = fractaltrain(*finetune)
    assert (outcome.code, outcome.err) == (1, "error: pt: no checkpoint yet; let its training save one first\n")
