"""The three commands together: build, verify, pre-train, fine-tune."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fractaltrain.cli import main

BIN = Path(sys.executable).parent


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program, *arguments = command.split()
    result = subprocess.run([BIN / program, *arguments], cwd=folder, text=True, capture_output=True, timeout=280)
    assert result.returncode == 0, result.stderr
    return result


def fractaltrain(arguments: str) -> Result:
    """Run in this process: a new one takes seconds to import PyTorch."""
    return CliRunner().invoke(main, arguments.split())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset in the default place, as the README makes it."""
    folder = tmp_path_factory.mktemp("workspace")
    result = run("fractalgen build --kind single --n 60 --val 20 --classes 5 --size 32 --shard-size 25", folder)
    assert "next: fractaltrain pt --shards shards/single" in result.stdout
    return folder


@pytest.mark.slow
def test_pretraining_and_finetuning(workspace: Path) -> None:
    pretraining = "fractaltrain pt --shards shards/single --model test_resnet --epochs 1 --batch-size 20"
    result = run(f"{pretraining} --nproc 2 --quiet", workspace)
    done, scores = result.stdout.splitlines()
    assert done.startswith("runs/single-test_resnet-anderson: 1 epoch done, training loss ")
    assert "20 val images" in scores
    assert all(line.startswith("warning: ") for line in result.stderr.splitlines())  # ranks that wait for each other
    run_folder = workspace / "runs/single-test_resnet-anderson"
    result = run(
        "fractaltrain ft --weights runs/single-test_resnet-anderson --data digits --per-class 2 --epochs 1"
        " --batch-size 10 --out runs/ft",
        workspace,
    )
    assert "top-1" in result.stdout + result.stderr
    figures = json.loads((workspace / "runs/ft/result.json").read_text())
    assert figures["samples"] == 1797 - 20
    assert 0 <= figures["top1"] <= figures["top5"] <= 1
    assert (run_folder / "metrics.jsonl").exists()


@pytest.mark.slow
def test_training_on_fractaldb_and_multi(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    run("fractalgen build --kind fractaldb --n 40 --classes 5 --size 32 --points 2000", workspace)
    result = fractaltrain("pt --shards shards/fractaldb --model test_resnet --epochs 1 --batch-size 20")
    assert "1 epoch done" in result.stdout
    recipe = json.loads((workspace / "runs/fractaldb-test_resnet-anderson/run.json").read_text())["settings"]["recipe"]
    assert (recipe["crop"], recipe["mean"]) == ("random", [0.2] * 3)  # as its authors saw it
    built = run("fractalgen build --kind multi --n 40 --val 20 --classes 5 --size 32 --points 2000", workspace)
    assert "next: fractaltrain pt --shards shards/multi" in built.stdout
    result = fractaltrain("pt --shards shards/multi --model test_resnet --epochs 2 --batch-size 10")
    assert "20 val images" in result.stdout
    scores = json.loads((workspace / "runs/multi-test_resnet-anderson/result.json").read_text())
    assert 0.1 < scores["map"] <= 1
    assert 0 <= scores["f1"] <= 1
    assert "top1" not in scores
