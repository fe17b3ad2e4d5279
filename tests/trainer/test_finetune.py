"""``fractaltrain ft`` on shards, from timm's weights, and with a frozen backbone."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from fractalshards import reader as stored
from fractalshards.manifest import load_manifest
from fractaltrain.checkpoint import load_checkpoint, load_run
from fractaltrain.config import ImagesConfig
from fractaltrain.data.images import open_data
from fractaltrain.models import create_model, freeze_backbone, set_training
from tiny_training import ALONE

SMALL = ("--model", "test_resnet", "--image-size", 16, "--batch-size", 10, "--epochs", 1)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_finetune_on_shards_and_evaluate(fractaltrain, dataset):
    data = f"shards:{dataset}"
    done = fractaltrain("ft", "--weights", "none", *SMALL, "--data", data, "--per-class", 4, "--quiet")
    assert (done.code, done.err) == (0, "")
    run = Path("runs/small-4-per-class-0-test_resnet-anderson-scratch")
    result = json.loads((run / "result.json").read_text())
    assert result["samples"] == 13
    done = fractaltrain("eval", "--weights", run, "--data", data, "--out", "report", "--quiet")
    assert (done.code, done.err) == (0, "")
    assert json.loads(Path("report/eval.json").read_text())["top1"] == result["top1"]


def test_per_class_subset_reads_no_images(dataset, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr(stored, "read_sample", refuse)
    data = open_data(ImagesConfig(f"shards:{dataset}", 3, 0, Path("unused")), ALONE)
    monkeypatch.undo()
    labels = [data.train.read(index).label for index in range(sum(data.train.lengths))]
    assert np.bincount(labels).tolist() == [3] * 5


@pytest.mark.parametrize(
    ("train", "val", "noun"),
    [
        ((20,), 0, "val"),
        ((3,), 5, "class 3"),
        ((20,), 3, "class 3"),
    ],
)
def test_shards_without_val_split_or_classes_are_refused(fractaltrain, write_dataset, tmp_path, train, val, noun):
    folder = write_dataset(tmp_path / "shards", train=train, val=val)
    outcome = fractaltrain("ft", "--weights", "none", *SMALL, "--data", f"shards:{folder}")
    assert outcome.code == 1
    assert outcome.err.startswith(f"error: {folder}")
    assert noun in outcome.err
    assert outcome.err.count("\n") == 1


def test_multi_label_shards_are_refused(fractaltrain, write_dataset, tmp_path):
    folder = write_dataset(tmp_path / "shards", train=(20,), val=5)
    info = json.loads((folder / "_info.json").read_text())
    (folder / "_info.json").write_text(json.dumps(info | {"label_type": "multi"}))
    outcome = fractaltrain("ft", "--weights", "none", *SMALL, "--data", f"shards:{folder}")
    assert (outcome.code, outcome.err.count("\n"), str(folder) in outcome.err) == (1, 1, True)


def test_frozen_backbone_stays_as_it_was(fractaltrain, dataset):
    fractaltrain("pt", "--shards", dataset, *SMALL, "--out", "pt")
    probe = (
        "--weights",
        "pt",
        "--data",
        f"shards:{dataset}",
        "--batch-size",
        10,
        "--epochs",
        1,
        "--freeze",
        "backbone",
    )
    done = fractaltrain("ft", *probe)
    assert (done.code, done.err) == (0, "")
    assert "fc.weight, fc.bias" in done.out
    before = load_checkpoint(Path("pt")).state["model"]
    after = load_checkpoint(Path("runs/small-from-pt-anderson-backbone-frozen")).state["model"]
    changed = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert changed == ["fc.weight", "fc.bias"]  # not even the statistics of batch norm


def test_exported_finetuning_names_its_pretraining(fractaltrain, dataset):
    fractaltrain("pt", "--shards", dataset, *SMALL, "--out", "pt")
    for start, out in (("pt", "once"), ("once", "twice")):
        done = fractaltrain("ft", "--weights", start, *SMALL[4:], "--data", f"shards:{dataset}", "--out", out)
        assert (done.code, done.err) == (0, "")
    assert fractaltrain("export", "twice", "--out", "export").code == 0
    card = Path("export/README.md").read_text()
    manifest = load_manifest(dataset)
    digests = (manifest.recipe_digest, manifest.content_digest(), load_run(Path("pt")).sha256)
    assert [digest for digest in digests if digest not in card] == []
    assert card.count("Fine-tuned") == 2


@pytest.mark.parametrize(("name", "head"), [("test_resnet", "fc"), ("test_vit", "head")])
def test_set_training_leaves_a_frozen_backbone_in_eval_mode(name, head):
    model = create_model(name, 5, 32).eval()
    set_training(model)
    assert all(module.training for module in model.modules())
    freeze_backbone(model)
    set_training(model)
    assert [name for name, module in model.named_modules() if module.training] == [head]


def test_timm_weights_are_loaded(fractaltrain, monkeypatch):
    """The test creates the weights, so that none are downloaded."""
    create, made = timm.create_model, []

    def fetch(name: str, pretrained: bool = False, **options: int) -> torch.nn.Module:
        model = create(name, **options)
        if pretrained:
            made.append(model)
        return model

    monkeypatch.setattr(timm, "create_model", fetch)
    data = ("--data", "digits", "--per-class", 2, "--lr", 1e-12)
    done = fractaltrain("ft", "--weights", "timm", *SMALL, *data)
    assert (done.code, done.err) == (0, "")
    assert "test_resnet.r160_in1k" in done.out
    assert done.out.count("fc.weight, fc.bias") == 2
    run = Path("runs/digits-2-per-class-0-from-timm-test_resnet-anderson")
    assert json.loads((run / "run.json").read_text())["settings"]["weights"] == "timm:test_resnet.r160_in1k"
    start = load_checkpoint(run).state["model"]["conv1.0.weight"]
    assert torch.allclose(start, made[0].state_dict()["conv1.0.weight"], atol=1e-6)


def test_timm_weights_without_internet_are_one_line(fractaltrain, monkeypatch):
    create = timm.create_model

    def fail(name: str, pretrained: bool = False, **options: int) -> torch.nn.Module:
        if pretrained:
            raise ConnectionError("name resolution failed\nand much more")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", fail)
    outcome = fractaltrain("ft", "--weights", "timm", *SMALL, "--data", "digits")
    assert outcome.code == 1
    assert "test_resnet.r160_in1k" in outcome.err
    assert "HF_HUB_OFFLINE=1" in outcome.err
    assert outcome.err.count("\n") == 1
