"""The command line: usage, failures in one line, and the two commands of the README at a small size."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest

from fractalshards.console import PATH
from fractalshards.webdataset import WebDatasetOptions
from fractaltrain import cli, distributed
from fractaltrain.config import DatasetConfig, RunConfig, TrainConfig

NO_TORCH = "import sys; sys.modules['torch'] = None; from fractaltrain.cli import main; main({arguments!r})"


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)


def test_help_does_not_import_torch(tmp_path):
    code = (
        "import sys; from fractaltrain import cli; print({'torch', 'timm', 'sklearn', 'matplotlib'} & {*sys.modules})"
    )
    assert python(code, tmp_path).stdout == "set()\n"


def test_matplotlib_of_a_notebook_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    code = "from fractaltrain.cli import main\ntry: main(['study', '--help'])\nexcept SystemExit: import matplotlib"
    assert python(code, tmp_path).stderr == ""


def test_missing_torch_names_the_extra(tmp_path):
    done = python(NO_TORCH.format(arguments=["ft", "--weights", "none", "--data", "digits"]), tmp_path)
    assert (done.returncode, done.stderr.count("\n"), ".[train]" in done.stderr) == (1, 1, True)


@pytest.mark.parametrize(
    ("arguments", "noun"),
    [
        ("pt", "--shards"),
        ("pt --shards x --recipe diet", "diet"),
        ("pt --shards x --set lr", "--set lr"),
        ("pt --shards x --set lerning=1", "lerning"),
        ("pt --shards x --batch-size many", "batch_size"),
        ("pt --shards x --epochs 0", "epochs"),
        ("pt --shards x --nproc 0", "--nproc"),
        ("pt --shards x --workers 999", "999"),
        ("pt --shards x --nproc 3", "--batch-size"),
        ("pt --shards x --cache-size many", "--cache-size"),
        ("pt --shards x --split val=", "--split"),
        ("pt --shards s3://x/y --label-key label", "--label-key"),
        ("ft --weights none --data digits --label-key label", "--label-key"),
        ("eval --weights x --data digits --split val", "--split"),
        ("ft --weights none --data digits --nproc 2 --accumulate 3", "--accumulate"),
        ("ft --data digits", "--weights"),
        ("ft --weights none --data mnistt", "mnistt"),
        ("ft --weights none --data imagefolder:", "imagefolder:"),
        ("ft --weights runs/x --model resnet50 --data digits", "--model"),
        ("ft --weights none --freeze backbone --data digits", "--freeze"),
        ("eval --data digits", "--weights"),
        ("export runs/x --out x.pt", "--out"),
        ("export runs/x --out=", "--out"),
    ],
)
def test_wrong_usage_is_one_line(fractaltrain, tmp_path, monkeypatch, arguments, noun):
    monkeypatch.chdir(tmp_path)
    outcome = fractaltrain(*arguments.split())
    assert (outcome.code, outcome.out) == (2, "")
    assert (outcome.err.startswith("error: "), outcome.err.count("\n"), noun in outcome.err) == (True, 1, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "noun"),
    [
        ("pt --shards nowhere", 1, "nowhere"),
        ("pt --shards DATASET/_info.json", 1, "_info.json"),
        ("pt --shards DATASET --label-key label", 2, "--label-key"),
        ("pt --shards DATASET --model resnet51", 2, "resnet51"),
        ("pt --shards DATASET --model test_resnet --batch-size 51", 2, "--batch-size"),
        ("pt --shards DATASET --model test_resnet --batch-size 5 --amp fp16", 2, "--amp"),
        ("pt --shards DATASET --model test_resnet --batch-size 5 --out /proc/nowhere", 1, "/proc/nowhere"),
        ("pt --shards DATASET --model inception_v3", 1, "inception_v3"),
        ("pt --shards DATASET --model vit_tiny_patch16_224 --image-size 8", 1, "vit_tiny_patch16_224"),
        ("ft --weights none --data digits --model crossvit_tiny_240 --image-size 32", 1, "crossvit_tiny_240"),
        ("ft --weights nowhere --data digits", 1, "nowhere"),
        ("ft --weights none --model test_resnet --data shards:nowhere", 1, "nowhere"),
        ("ft --weights none --model test_resnet --data imagefolder:nowhere", 1, "nowhere"),
        ("ft --weights none --model test_resnet --data digits --per-class 180", 1, "--per-class"),
        ("ft --weights timm --model deit_small_patch32_224 --data digits", 2, "deit_small_patch32_224"),
        ("eval --weights nowhere --data digits", 1, "nowhere"),
        ("export nowhere --out x.safetensors", 1, "nowhere"),
    ],
)
def test_failure_is_one_line(fractaltrain, tmp_path, monkeypatch, dataset, arguments, code, noun):
    monkeypatch.chdir(tmp_path)
    outcome = fractaltrain(*arguments.replace("DATASET", str(dataset)).split())
    assert outcome.code == code
    assert (outcome.err.startswith("error: "), outcome.err.count("\n"), noun in outcome.err) == (True, 1, True)
    assert not list(tmp_path.rglob("run.json"))


def test_every_path_option_refuses_an_empty_path():
    parameters = [parameter for command in cli.main.commands.values() for parameter in command.params]
    paths = [parameter.type for parameter in parameters if isinstance(parameter.type, click.Path)]
    assert len(paths) > 10
    assert all(kind is PATH or kind.exists for kind in paths)


def test_options_become_one_config(fractaltrain, dataset, monkeypatch, tmp_path):
    launched = []
    monkeypatch.setattr(distributed, "launch", lambda entry, config, nproc: launched.append((config, nproc)))
    run = {"out": tmp_path, "seed": 5, "pad": True, "amp": "bf16", "workers": 3, "on_bad_sample": "skip",
           "save_every_minutes": 2.5, "keep": 9, "resume": "must", "accumulate": 2, "compile": True,
           "deterministic": True, "eval_every": 4, "sync_batchnorm": True, "quiet": True}  # fmt: skip
    assert run.keys() == {field.name for field in fields(RunConfig)}
    options = [
        word
        for name, value in run.items()
        for word in (f"--{name.replace('_', '-')}", *([] if value is True else [value]))
    ]
    recipe = ("--recipe", "deit", "--epochs", 7, "--batch-size", 32, "--lr", 0.5, "--scale-lr", "--set", "mixup=0.5")
    data = ("--shards", dataset, "--window", 5, "--nodes-split", "--model", "resnet50", "--image-size", 48)
    assert fractaltrain("pt", *data, *recipe, *options, "--nproc", 2).code == 0
    [(config, nproc)] = launched
    assert isinstance(config, TrainConfig)
    assert (config.run, nproc) == (RunConfig(**run), 2)
    assert config.data == DatasetConfig(str(dataset), window=5, nodes_split=True, tars=WebDatasetOptions(skip_bad=True))
    assert (config.model.name, config.model.image_size) == ("resnet50", 48)
    changed = config.recipe
    assert (changed.name, changed.epochs, changed.batch_size, changed.mixup) == ("deit", 7, 32, 0.5)
    assert changed.lr == pytest.approx(0.5 * 32 / 1024)


def test_pretrain_then_finetune(fractaltrain, tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    common = ("--batch-size", 25, "--image-size", 16)
    pretrain = ("pt", "--shards", dataset, "--model", "test_resnet", *common, "--epochs", 2)
    done = fractaltrain(*pretrain)
    assert (done.code, done.err) == (0, "")
    run = Path("runs/small-test_resnet-anderson")
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert settings["recipe"] | {"epochs": 2, "batch_size": 25, "lr": 0.1} == settings["recipe"]
    assert (settings["model"], settings["classes"], settings["image_size"]) == ("test_resnet", 5, 16)
    assert json.loads((run / "result.json").read_text())["samples"] == 13
    again = fractaltrain(*pretrain)
    assert (again.code, again.out.splitlines()[-2:]) == (0, done.out.splitlines()[-2:])

    digits = ("--data", "digits", "--per-class", 3, "--batch-size", 25, "--epochs", 1)
    done = fractaltrain("ft", "--weights", run, *digits)
    assert (done.code, done.err) == (0, "")
    assert done.out.count("fc.weight, fc.bias") == 2
    run = Path("runs/digits-3-per-class-0-from-small-test_resnet-anderson-anderson")
    assert json.loads((run / "result.json").read_text())["samples"] == 1767
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert (settings["image_size"], settings["classes"]) == (16, 10)

    done = fractaltrain("ft", "--weights", "none", "--model", "test_resnet", *digits, "--image-size", 16)
    assert (done.code, done.err) == (0, "")
    run = Path("runs/digits-3-per-class-0-test_resnet-anderson-scratch")
    settings = json.loads((run / "run.json").read_text())["settings"]
    assert (settings["recipe"]["lr"], settings["weights"]) == (0.15, None)


def test_quiet_prints_only_results(fractaltrain, tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    common = ("--batch-size", 25, "--image-size", 16, "--epochs", 2, "--quiet")
    done = fractaltrain("pt", "--shards", dataset, "--model", "test_resnet", "--out", "run", *common)
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 2)
    frozen = ("--freeze", "backbone", "--out", "probe")
    done = fractaltrain("ft", "--weights", "run", "--data", "digits", "--per-class", 3, *frozen, *common)
    assert (done.code, done.err, done.out.count("\n")) == (0, "", 2)


def test_finetuning_notices_other_weights(fractaltrain, tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    common = ("--batch-size", 20, "--image-size", 16, "--epochs", 1)
    for seed in (0, 1):
        fractaltrain("pt", "--shards", dataset, "--model", "test_resnet", *common, "--seed", seed, "--out", f"pt{seed}")
    finetune = ("--data", "digits", "--per-class", 2, *common, "--out", "ft")
    assert fractaltrain("ft", "--weights", "pt0", *finetune).code == 0
    outcome = fractaltrain("ft", "--weights", "pt1", *finetune)
    assert (outcome.code, "weights" in outcome.err) == (1, True)


def test_finetuning_skips_a_damaged_checkpoint(fractaltrain, tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    common = ("--batch-size", 20, "--image-size", 16)
    fractaltrain("pt", "--shards", dataset, "--model", "test_resnet", *common, "--epochs", 2, "--out", "pt")
    finetune = ("ft", "--weights", "pt", "--data", "digits", "--per-class", 2, *common, "--epochs", 1, "--out", "ft")
    before, newest = sorted(Path("pt").glob("checkpoint-*.pt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    outcome = fractaltrain(*finetune)
    first, second = outcome.out.splitlines()[:2]
    assert (outcome.code, newest.name in first, "after 1 epoch" in second) == (0, True, True)
    before.unlink()
    newest.unlink()
    outcome = fractaltrain(*finetune)
    assert (outcome.code, outcome.err.count("\n"), "checkpoint" in outcome.err) == (1, 1, True)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_output_that_nobody_reads_ends_a_run_silently(tmp_path, dataset, processes):
    """As with ``| head``."""
    words = ("pt", "--shards", dataset, "--model", "test_resnet", "--batch-size", 20, "--nproc", processes)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fractaltrain", *map(str, words)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(writer)
    assert done.returncode == 1
    assert all(line.startswith("warning: ") for line in done.stderr.splitlines())  # of ranks that wait for each other


@pytest.mark.slow
def test_names_that_are_not_utf_8(fractaltrain, tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    odd = os.fsdecode(b"\xff")
    Path(f"shards{odd}").symlink_to(dataset)
    common = ("--batch-size", 25, "--image-size", 16, "--epochs", 1)
    pretrain = ("pt", "--shards", f"shards{odd}", "--model", "test_resnet", *common, "--out", f"pt{odd}")
    assert [fractaltrain(*pretrain).code, fractaltrain(*pretrain).code] == [0, 0]  # the second finds a finished run
    data = ("--data", f"shards:shards{odd}")
    assert fractaltrain("ft", "--weights", f"pt{odd}", *data, *common, "--out", f"ft{odd}").code == 0
    assert fractaltrain("eval", "--weights", f"ft{odd}", *data).code == 0
    assert fractaltrain("compare", f"ft{odd}", "--out", f"table{odd}").code == 0
    assert {path.name for path in Path(f"ft{odd}").iterdir()} >= {"history.png", "result.json"}
    assert (Path(f"table{odd}") / "figure.png").exists()
