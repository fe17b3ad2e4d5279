"""``fractaltrain export``: timm loads the file with the weights of the run."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fractaltrain.checkpoint import Position, save_checkpoint
from fractaltrain.config import RunConfig
from fractaltrain.models import create_model
from fractaltrain.recipes import FT_RECIPES
from fractaltrain.run_folder import open_run
from tiny_training import ALONE


def write_run(folder: Path, name: str, classes: int = 7, seed: int = 0) -> torch.nn.Module:
    """Write a run of a random model; return the model."""
    torch.manual_seed(seed)
    model = create_model(name, classes, 64).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    recipe = FT_RECIPES["anderson"]
    settings = {"task": "ft", "model": name, "classes": classes, "image_size": 64, "recipe": asdict(recipe)}
    open_run(folder, settings | {"precision": "torch.float32"}, {}, "auto")
    save_checkpoint(RunConfig(folder), Position(epoch=1), {"model": model}, ALONE)
    return model


@pytest.mark.parametrize("name", ["resnet10t", "resnet50", "vit_tiny_patch16_224", "deit_small_patch32_224"])
def test_export_loads_in_timm(fractaltrain, tmp_path, name):
    """Weights are bit-identical; outputs are close, as timm computes ResNet-50 in another order than torchvision."""
    model = write_run(tmp_path / "run", name)
    path = tmp_path / "model.safetensors"
    done = fractaltrain("export", tmp_path / "run", "--out", path)
    assert (done.code, done.err) == (0, "")
    names: dict[str, torch.nn.Module] = {}
    exec(done.out.splitlines()[-1], names)
    loaded = names["model"].eval()
    expected = model.state_dict()
    assert set(loaded.state_dict()) == set(expected)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.allclose(loaded(images), model(images), atol=1e-5)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == {"deit_small_patch32_224": "vit_small_patch32_224"}.get(name, name)
    assert (metadata["classes"], metadata["image_size"], metadata["epochs"]) == ("7", "64", "1")
    assert json.loads(metadata["mean"]) == [0.5, 0.5, 0.5]


def test_export_keeps_files_that_are_there(fractaltrain, tmp_path):
    write_run(tmp_path / "a", "resnet10t")
    write_run(tmp_path / "b", "resnet10t", seed=1)
    path = tmp_path / "new" / "model.safetensors"
    assert fractaltrain("export", tmp_path / "a", "--out", path).code == 0
    before = path.read_bytes()
    assert fractaltrain("export", tmp_path / "a", "--out", path).code == 0
    outcome = fractaltrain("export", tmp_path / "b", "--out", path)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (1, "", 1)
    assert str(path) in outcome.err
    assert path.read_bytes() == before
    path.write_text("no tensors")
    assert fractaltrain("export", tmp_path / "a", "--out", path).code == 1
    assert path.read_text() == "no tensors"
    outcome = fractaltrain("export", tmp_path / "a", "--out", tmp_path / "model.pt")
    assert (outcome.code, ".safetensors" in outcome.err) == (2, True)


@pytest.mark.parametrize("name", ["resnet18", "hf-hub:timm/resnet10t.c3_in1k"])
def test_export_refuses_weights_of_another_model(fractaltrain, tmp_path, name):
    """A name of the hub is refused before anything is downloaded."""
    write_run(tmp_path / "run", "resnet10t")
    text = (tmp_path / "run" / "run.json").read_text()
    (tmp_path / "run" / "run.json").write_text(text.replace("resnet10t", name))
    outcome = fractaltrain("export", tmp_path / "run", "--out", tmp_path / "x.safetensors")
    assert (outcome.code, outcome.err.count("\n")) == (1, 1)
    assert name in outcome.err
    assert not (tmp_path / "x.safetensors").exists()
