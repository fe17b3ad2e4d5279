"""Models by name, pre-trained weights, and ``export``: timm loads the weights of the run."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors import safe_open

from fractalshards.digest import mapping_digest
from fractalshards.errors import FractalError
from fractaltrain.checkpoint import Position, save_checkpoint
from fractaltrain.config import RunConfig
from fractaltrain.models import create_model, describe_border, freeze_backbone, load_backbone, set_training
from fractaltrain.optim import build_state
from fractaltrain.recipes import FT_RECIPES, PT_RECIPES
from fractaltrain.run_folder import open_run
from fractaltrain.transforms import normalize, val_transform
from tiny_training import ALONE, RECIPE

PARTS = ("weight", "bias")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet50", 25_557_032),  # torchvision's, as it documents it; timm's has as many
        ("deit_small_patch16_224", 22_050_664),  # 22 M in Touvron et al. 2021
        # larger patches add (32^2 - 16^2) * 3 weights a channel, and have 147 positions less
        ("deit_small_patch32_224", 22_050_664 + 384 * 3 * (32**2 - 16**2) - 384 * (196 - 49)),
    ],
)
def test_models_have_the_published_size(name, parameters):
    model = create_model(name, 1000, 224)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert isinstance(model, torchvision.models.ResNet) == (name == "resnet50")


def test_pixels_outside_of_the_patches_are_named():
    for name, patch in (("vit_tiny_patch16_224", 16), ("swin_tiny_patch4_window7_224", 4)):
        (line,) = describe_border(create_model(name, 7, 50), 50)
        assert f"patches of {patch} pixels cover 48 of" in line
    for name, size, given in (("test_vit", 48, {}), ("resnet18", 50, {}), ("test_vit", 50, {"dynamic_img_pad": True})):
        assert describe_border(create_model(name, 7, size, arguments=given), size) == []


def test_model_without_a_classifier_is_refused(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *arguments, **options: torch.nn.Flatten())
    with pytest.raises(FractalError, match="resnet18"):
        create_model("resnet18", 7, 32)


WRONG_ARGUMENTS = [
    ("patchsize", 4), ("patch_size", "big"), ("patch_size", 0), ("embed_dim", 100), ("in_chans", 1), ("num_classes", 3),
    ("img_size", 64), ("drop_path_rate", 0.1), ("pretrained", True), ("pretrained_cfg", "hf-hub:x/y"),
    ("checkpoint_path", "x.pth"), ("no=name", None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "noun"),
    [
        ("deit_smal_patch32_224", {}, "deit_small_patch32_224"),
        ("vit_tiny", {}, "vit_tiny_patch16_224"),
        ("qqqqq", {}, "qqqqq"),
        ("resnet50", {"drop_path": 0.1}, "resnet50.*drop_path"),
        ("vgg11", {"drop_path": 0.1}, "vgg11.*drop_path"),
        ("resnet50", {"arguments": {"weights": "DEFAULT"}}, "weights"),  # of torchvision
        *(("vit_tiny_patch16_224", {"arguments": {name: value}}, name) for name, value in WRONG_ARGUMENTS),
    ],
    ids=str,
)
def test_model_that_cannot_be_created_is_one_line(name, options, noun):
    with pytest.raises(FractalError, match=noun) as error:
        create_model(name, 1000, 32, **options)
    assert "\n" not in str(error.value)


def test_creating_a_model_draws_no_random_numbers_for_the_check():
    """Runs are bit-equal to those of before there was one."""
    torch.manual_seed(0)
    model = create_model("resnet18", 7, 32)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    expected = timm.create_model("resnet18", num_classes=7).state_dict()
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("name", "head"), [("test_resnet", "fc"), ("test_vit", "head")])
def test_set_training_leaves_a_frozen_backbone_in_eval_mode(name, head):
    """Its dropout, drop path and batch norm do nothing."""
    model = create_model(name, 5, 32).eval()
    set_training(model)
    assert all(module.training for module in model.modules())
    freeze_backbone(model)
    set_training(model)
    assert [name for name, module in model.named_modules() if module.training] == [head]


@pytest.mark.parametrize(("amp", "fused"), [("bf16", False), ("fp32", True)])
def test_attention_is_fused_unless_in_bf16_on_a_cpu(tmp_path, amp, fused):
    model = build_state(create_model("test_vit", 3, 32), RECIPE, RunConfig(tmp_path, amp=amp), False, 1, ALONE).model
    assert {module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")} == {fused}


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "deit_small_patch32_224"])
def test_drop_path_reaches_the_last_block(name):
    model = create_model(name, 3, 32, drop_path=0.25)
    assert [module.drop_prob for module in model.modules() if hasattr(module, "drop_prob")][-1] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("resnet50", ("fc",)),
        ("deit_small_patch32_224", ("head",)),
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
        ("convnext_atto", ("head.fc",)),
    ],
)
def test_load_backbone_loads_everything_but_the_heads(name, heads):
    before, after = create_model(name, 20, 32), create_model(name, 10, 32)
    torch.nn.init.ones_(next(before.parameters()))
    fresh = {f"{head}.{part}": after.get_parameter(f"{head}.{part}").clone() for head in heads for part in PARTS}
    report = load_backbone(after, before.state_dict(), "runs/x")
    for key, tensor in after.state_dict().items():
        assert torch.equal(tensor, fresh[key] if key in fresh else before.state_dict()[key]), key
    assert report.startswith(f"{len(fresh.keys() ^ after.state_dict().keys())} tensors loaded")
    assert report.count(", ".join(fresh)) == 2  # not loaded, and new


@pytest.mark.parametrize(
    ("given", "wanted", "option"),
    [("resnet18", "resnet10t", "--weights"), ("mixer_s16_224", "mixer_s16_224", "--image-size")],
)
def test_load_backbone_refuses_weights_of_another_model(given, wanted, option):
    weights = create_model(given, 10, 64).state_dict()
    with pytest.raises(FractalError, match=f"^runs/x: .*{option}"):
        load_backbone(create_model(wanted, 10, 32), weights, "runs/x")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_small_patch32_224", "deit_tiny_distilled_patch16_224"])
def test_load_backbone_resamples_position_embeddings(name):
    before, after = create_model(name, 3, 64), create_model(name, 5, 96)
    report = load_backbone(after, before.state_dict(), "runs/x")
    assert "pos_embed" in report
    loaded, prefix = after.state_dict()["pos_embed"], after.num_prefix_tokens
    given = before.state_dict()["pos_embed"]
    assert torch.equal(loaded[:, :prefix], given[:, :prefix])
    sides = [int((table.shape[1] - prefix) ** 0.5) for table in (given, loaded)]
    grids = [table[:, prefix:].unflatten(1, (side, side)) for table, side in zip((given, loaded), sides, strict=True)]
    assert sides[0] < sides[1]
    assert torch.allclose(grids[0].mean((1, 2)), grids[1].mean((1, 2)), atol=0.01)
    assert torch.equal(after.state_dict()["blocks.0.attn.qkv.weight"], before.state_dict()["blocks.0.attn.qkv.weight"])


def write_run(folder: Path, name: str, classes: int = 7, seed: int = 0, **more: Any) -> torch.nn.Module:
    """Write a run of a random model with more settings; return the model."""
    torch.manual_seed(seed)
    model = create_model(name, classes, 64, arguments=more.get("model_args", {})).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
    recipe = FT_RECIPES["anderson"]
    settings = {"task": "ft", "model": name, "classes": classes, "image_size": 64, "recipe": asdict(recipe)}
    with open_run(folder, settings | {"precision": "torch.float32"} | more, {}, "auto"):
        save_checkpoint(RunConfig(folder), Position(epoch=1), {"model": model}, ALONE)
    return model


@pytest.mark.parametrize("out", ["model.safetensors", "some/folder#1"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet10t", {}),
        ("resnet50", {}),
        ("vit_tiny_patch16_224", {"patch_size": 8, "depth": 2}),
        ("deit_small_patch32_224", {"depth": 3}),
    ],
)
def test_export_loads_in_timm(fractaltrain, tmp_path, name, arguments, out):
    model = write_run(tmp_path / "run", name, model_args=arguments)
    path = tmp_path / out
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
        assert torch.equal(loaded(images), model(images))
    with safe_open(path if path.is_file() else path / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["model"] == {"deit_small_patch32_224": "vit_small_patch32_224"}.get(name, name)
    assert (metadata["classes"], metadata["image_size"], metadata["epochs"]) == ("7", "64", "1")
    assert json.loads(metadata["mean"]) == [0.5, 0.5, 0.5]


_SINGLE = {"kind": "single", "n": 60, "classes": 6, "systems_digest": "0"}
_RECIPE_DIGEST = mapping_digest(_SINGLE)
_PRETRAINING = {"dataset": "mine", "dataset_digest": "0" * 32, "dataset_recipe": _SINGLE}
_BEFORE = {"recipe": asdict(PT_RECIPES["rcdb"]), **_PRETRAINING}
_FINETUNING = {"data": "imagefolder:/home/me/photos", "weights": "a1b2", "pretraining": _BEFORE}


@pytest.mark.parametrize(
    ("more", "licence", "words"),
    [
        (_PRETRAINING, "mit", ("mine", "`single`", "0" * 32, "2110.03091", "changed: epochs=3")),
        (_FINETUNING, "unknown", ("`photos`", "a1b2", "mine", "2206.09132", "changed: nothing")),
        ({}, "unknown", ()),
        (_PRETRAINING | {"dataset_digest": _RECIPE_DIGEST}, "mit", (f"recipe digest `{_RECIPE_DIGEST}`.",)),
    ],
    ids=["pre-trained", "fine-tuned", "of an old version", "on what was never built"],
)
def test_export_writes_a_model_card(fractaltrain, tmp_path, monkeypatch, more, licence, words):
    """The code in it loads the model, and the transform that it was evaluated with."""
    recipe = FT_RECIPES["anderson"] if "data" in more else replace(PT_RECIPES["anderson"], epochs=3)
    names = tuple("abcdefg")
    model = write_run(tmp_path / "run", "resnet10t", recipe=asdict(recipe), class_names=names, **more)
    (tmp_path / "run" / "result.json").write_text('{"epochs": 1, "top1": 0.5}')
    assert fractaltrain("export", tmp_path / "run", "--out", tmp_path / "mine").code == 0
    card = huggingface_hub.ModelCard.load(tmp_path / "mine" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("timm", "image-classification")
    assert (card.data.license, card.data.eval_results[0].metric_value) == (licence, 0.5)
    assert [word for word in (*words, "0.5") if word not in card.text] == []
    assert "/home" not in card.text
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["num_features"]) == ("resnet10t", 7, 512)
    assert config["label_names"] == [*names]
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(card.text.split("```python")[1].split("```")[0], found)
    image = np.random.default_rng(0).integers(0, 256, (80, 50, 3), np.uint8)
    tensor = found["transform"](Image.fromarray(image))[None]
    seen = torch.from_numpy(val_transform(recipe, 64)(image, 0).copy()).permute(2, 0, 1)[None]
    assert torch.allclose(tensor, normalize(seen, recipe), atol=1e-6)
    with torch.inference_mode():
        assert torch.equal(found["model"](tensor), model(tensor))


def test_export_completes_its_own_files_and_leaves_others_alone(fractaltrain, tmp_path):
    write_run(tmp_path / "a", "resnet10t")
    write_run(tmp_path / "b", "resnet10t", seed=1)
    file, folder = tmp_path / "new" / "model.safetensors", tmp_path / "folder"
    assert [fractaltrain("export", tmp_path / "a", "--out", out).code for out in (file, folder)] == [0, 0]
    before, config = file.read_bytes(), (folder / "config.json").read_bytes()
    (folder / "config.json").unlink()  # as if the export had been killed
    for started in (tmp_path / "started", file.parent):
        started.mkdir(exist_ok=True)
        (started / f".tmp~{os.uname().nodename}~999999999~00000000~model.safetensors").write_bytes(b"half")
    assert fractaltrain("export", tmp_path / "a", "--out", tmp_path / "started").code == 0
    (folder / "README.md").write_text("my own")
    assert [fractaltrain("export", tmp_path / "a", "--out", out).code for out in (file, folder)] == [0, 0]
    assert ((folder / "config.json").read_bytes(), (folder / "README.md").read_text()) == (config, "my own")
    for run, out in (("b", file), ("b", folder), ("a", tmp_path / "a"), ("a", tmp_path / "a" / "run.json")):
        fractaltrain("export", tmp_path / run, "--out", out).assert_refused(1, str(out))
    assert file.read_bytes() == before
    assert not [*tmp_path.glob("*/.tmp*")]
    for damaged in (b"no tensors", before[:-1], before[:-1] + bytes([before[-1] ^ 1])):
        file.write_bytes(damaged)
        fractaltrain("export", tmp_path / "a", "--out", file).assert_refused(1, str(file))
        assert file.read_bytes() == damaged


@pytest.mark.parametrize("name", ["resnet18", "hf-hub:timm/resnet10t.c3_in1k"])
def test_export_refuses_weights_of_another_model(fractaltrain, tmp_path, name):
    """A name of the hub is refused before anything is downloaded."""
    write_run(tmp_path / "run", "resnet10t")
    text = (tmp_path / "run" / "run.json").read_text()
    (tmp_path / "run" / "run.json").write_text(text.replace("resnet10t", name))
    fractaltrain("export", tmp_path / "run", "--out", tmp_path / "x.safetensors").assert_refused(1, name)
    assert not (tmp_path / "x.safetensors").exists()
