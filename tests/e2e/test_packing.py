"""Real images as one more dataset: a folder of JPEGs is packed, checked, looked at, and trained on."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fractalshards.manifest import load_manifest
from in_this_process import fractaltrain

BIN = Path(sys.executable).parent


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program, *arguments = command.split()
    result = subprocess.run([BIN / program, *arguments], cwd=folder, text=True, capture_output=True, timeout=280)
    assert result.returncode == 0, result.stderr
    return result


def test_from_a_folder_of_jpegs_to_a_trained_model(
    tmp_path: Path, image_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    image_folder(tmp_path / "flowers", {"rose": 14, "aster": 16, "tulip": 10})
    packed = run(
        "fractalshards pack imagefolder:flowers shards/flowers --split train=0.8,val=0.2 --shard-size 10", tmp_path
    )
    assert packed.stdout.splitlines()[-1] == "next: fractaltrain pt --shards shards/flowers"
    assert (
        "sound: shards/flowers: 32 train, 8 val images" in run("fractalshards verify shards/flowers", tmp_path).stdout
    )
    assert load_manifest(tmp_path / "shards/flowers").image_size is None  # they differ

    options = "--model test_resnet --epochs 1 --batch-size 16"
    monkeypatch.chdir(tmp_path)
    assert "1 epoch done" in fractaltrain(f"pt --shards shards/flowers {options}").stdout
    folder = tmp_path / "runs/flowers-test_resnet-anderson"
    settings = json.loads((folder / "run.json").read_text())["settings"]
    assert (settings["classes"], settings["image_size"]) == (3, 224)
    assert json.loads((folder / "result.json").read_text())["samples"] == 8
