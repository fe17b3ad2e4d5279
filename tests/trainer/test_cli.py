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

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_help_does_not_import_torch(tmp_path, monkeypatch):
    """Afterwards matplotlib does not look for the backend that a notebook names, which may not be installed."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    code = """
import sys; from fractaltrain.cli import main
try: main(["study", "--help"])
except SystemExit: print({"torch", "timm", "sklearn", "matplotlib"} & {*sys.modules}); import matplotlib
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("set()", "")


@pytest.mark.parametrize(
    ("arguments", "code", "noun"),
    [
        ("pt", 2, "--shards"),
        ("pt --shards x --render y", 2, "--render"),
        ("pt --shards x --fresh", 2, "--fresh"),
        ("pt --render x --fresh --memory", 2, "--memory"),
        ("pt --render x --label-key y", 2, "--label-key"),
        ("pt --shards pipe:cat", 2, "URL"),
        ("pt --shards x --set lr", 2, "--set lr"),
        ("pt --shards x --epochs 0", 2, "epochs"),
        ("pt --shards x --nproc 3", 2, "--batch-size"),
        ("pt --shards x --cache-size many", 2, "--cache-size"),
        ("pt --shards x --memory-size many", 2, "--memory-size"),  # also without --memory
        ("pt --shards x --split val=", 2, "--split"),
        ("pt --shards s3://x/y --label-key label", 2, "--label-key"),
        ("ft --weights none --data digits --label-key label", 2, "--label-key"),
        ("eval --weights x --data digits --split val", 2, "--split"),
        ("ft --weights none --data digits --nproc 2 --accumulate 3", 2, "--accumulate"),
        ("ft --data digits", 2, "--weights"),
        ("ft --weights none --data mnistt", 2, "mnistt"),
        ("ft --weights none --data imagefolder:", 2, "imagefolder:"),
        ("ft --weights runs/x --model resnet50 --data digits", 2, "--model"),
        ("ft --weights none --freeze backbone --data digits", 2, "--freeze"),
        ("export runs/x --out x.pt", 2, "--out"),
        ("pt --shards nowhere", 1, "nowhere"),
        ("pt --shards DATASET/_info.json", 1, "_info.json"),
        ("pt --shards DATASET --label-key label", 2, "--label-key"),
        ("pt --shards DATASET --model test_resnet --batch-size 51", 2, "--batch-size"),
        ("pt --shards DATASET --model test_resnet --batch-size 5 --amp fp16", 2, "--amp"),
        ("pt --shards DATASET --model test_resnet --batch-size 5 --sync-batchnorm", 2, "--sync-batchnorm"),
        ("pt --shards DATASET --model test_resnet --batch-size 5 --out /proc/nowhere", 1, "/proc/nowhere"),
        ("pt --shards DATASET --model inception_v3", 1, "inception_v3"),
        ("pt --shards DATASET --model vit_tiny_patch16_224 --image-size 8", 1, "vit_tiny_patch16_224"),
        ("ft --weights none --data digits --model crossvit_tiny_240 --image-size 32", 1, "crossvit_tiny_240"),
        ("pt --render nowhere.json", 1, "nowhere.json"),
        ("ft --weights nowhere --data digits", 1, "nowhere"),
        ("ft --weights none --model test_resnet --data shards:nowhere", 1, "nowhere"),
        ("ft --weights none --model test_resnet --data imagefolder:nowhere", 1, "nowhere"),
        ("ft --weights none --model test_resnet --data digits --per-class 180", 1, "--per-class"),
        ("ft --weights timm --model deit_small_patch32_224 --data digits", 2, "deit_small_patch32_224"),
        ("eval --weights nowhere --data digits", 1, "nowhere"),
        ("export nowhere --out x.safetensors", 1, "nowhere"),
        ("compare . --out x", 1, "error: .: "),
    ],
)
def test_mistake_is_one_line_and_writes_nothing(fractaltrain, tmp_path, dataset, arguments, code, noun):
    fractaltrain(*(word.replace("DATASET", str(dataset)) for word in arguments.split())).assert_refused(code, noun)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


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
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in run.items()]
    options = [word for pair in pairs for word in pair if word is not True]
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


def settings_and_result(run: str) -> tuple[dict, dict]:
    folder = Path("runs", run)
    return json.loads((folder / "run.json").read_text())["settings"], json.loads((folder / "result.json").read_text())


def test_pretrain_then_finetune(fractaltrain, dataset):
    common = ("--batch-size", 25, "--image-size", 16)
    pretrain = ("pt", "--shards", dataset, "--model", "test_resnet", *common, "--epochs", 2)
    done = fractaltrain(*pretrain)
    assert (done.code, done.err) == (0, "")
    settings, result = settings_and_result("small-test_resnet-anderson")
    assert settings["recipe"] | {"epochs": 2, "batch_size": 25, "lr": 0.1} == settings["recipe"]
    assert (settings["model"], settings["classes"], settings["image_size"]) == ("test_resnet", 5, 16)
    assert result["samples"] == 13
    again = fractaltrain(*pretrain)
    assert (again.code, again.out.splitlines()[-2:]) == (0, done.out.splitlines()[-2:])

    digits = ("--data", "digits", "--per-class", 3, "--batch-size", 25, "--epochs", 1)
    done = fractaltrain("ft", "--weights", "runs/small-test_resnet-anderson", *digits)
    assert (done.code, done.err, done.out.count("fc.weight, fc.bias")) == (0, "", 2)
    settings, result = settings_and_result("digits-3-per-class-0-from-small-test_resnet-anderson-anderson")
    assert (settings["image_size"], settings["classes"], result["samples"]) == (16, 10, 1767)

    done = fractaltrain("ft", "--weights", "none", "--model", "test_resnet", "--image-size", 16, *digits)
    assert (done.code, done.err) == (0, "")
    settings, _ = settings_and_result("digits-3-per-class-0-test_resnet-anderson-scratch")
    assert (settings["recipe"]["lr"], settings["weights"]) == (0.15, None)


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
