"""What works by itself, together: schedules and optimisers that are interrupted, and options of several processes."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from fractalshards.manifest import sample_key, shard_name, write_manifest
from fractalshards.sample import MultiLabel, Object
from fractalshards.writer import write_shard
from fractaltrain.checkpoint import list_checkpoints, load_checkpoint
from fractaltrain.run_folder import read_metrics

CLASSES, SIZE = 5, 32


def curve(folder: Path) -> list[tuple[object, ...]]:
    return [(line["split"], line["global_step"], line.get("loss"), line.get("lr")) for line in read_metrics(folder)]


def state(folder: Path, part: str = "model") -> dict[str, torch.Tensor]:
    saved = load_checkpoint(folder)
    assert saved is not None
    return saved.state[part]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.fixture(scope="session")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 training images and 11 to validate, with one to three of five classes each: a bright bar for each."""
    folder = tmp_path_factory.mktemp("several")
    generator = np.random.default_rng(0)
    records, index = {}, 0
    for split, count in (("train", 48), ("val", 11)):
        samples = []
        for _ in range(count):
            shown = generator.choice(CLASSES, generator.integers(1, 4), replace=False).tolist()
            pixels = generator.integers(0, 100, (SIZE, SIZE, 3), np.uint8)
            for label in shown:
                pixels[:, 6 * label : 6 * label + 6] += 120
            label = MultiLabel.of(tuple(Object(label, (6 * label, 0, 6, SIZE)) for label in shown))
            samples.append((sample_key(index), (pixels, label)))
            index += 1
        records[split] = [write_shard(folder, shard_name(split, 0), CLASSES, samples)]
    write_manifest(
        folder, records, recipe={"kind": "test"}, recipe_digest="test", label_type="multi", classes=CLASSES,
        image_size=SIZE,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ("--recipe", "deit", "--model", "test_vit", "--set", "repeats=1", "--set", "warmup_epochs=1"),
        ("--recipe", "kataoka", "--model", "test_resnet", "--set", "milestones=1,2", "--image-size", 24),
    ],
    ids=["adamw-cosine", "step"],
)
def test_a_killed_run_continues_bit_for_bit(world, dataset, tmp_path, options):
    common = ("pt", "--shards", dataset, *options, "--batch-size", 4, "--epochs", 2, "--save-every-minutes", 0)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = world(1, *common, "--out", whole)
    assert (done.codes, done.said()) == ([0], "")
    ended = world(1, *common, "--out", killed, signals=[[0, 1, 11, signal.SIGKILL]])
    assert ended.codes == [-signal.SIGKILL]
    done = world(1, *common, "--out", killed)
    assert (done.codes, done.said()) == ([0], "")
    assert "continuing at epoch 2, step 10" in done.out[0]
    assert curve(killed) == curve(whole)
    assert same(state(killed), state(whole))
    assert len({line["lr"] for line in read_metrics(whole) if "lr" in line}) > 1


def test_averages_mixing_several_classes_and_parts_of_a_batch_in_two_processes(world, fractaltrain, several, tmp_path):
    """Stopped and continued it is the same run, and what was evaluated are the averages of both processes."""
    common = (
        "pt", "--shards", several, "--model", "test_resnet", "--batch-size", 8, "--epochs", 2, "--accumulate", 2,
        "--set", "ema=0.9", "--set", "mixup=0.8", "--set", "cutmix=1",
    )  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    done = world(2, *common, "--out", whole)
    assert (done.codes, done.said()) == ([0, 0], "")
    assert world(2, *common, "--out", stopped, signals=[[1, 1, 3, signal.SIGTERM]], agent=False).codes == [75, 75]
    done = world(2, *common, "--out", stopped)
    assert (done.codes, done.said()) == ([0, 0], "")
    assert curve(stopped) == curve(whole)
    assert all(same(state(stopped, part), state(whole, part)) for part in ("model", "ema"))
    result = json.loads((stopped / "result.json").read_text())
    arguments = ("eval", "--weights", stopped, "--data", f"shards:{several}", "--out", tmp_path / "eval", "--quiet")
    evaluated = fractaltrain(*arguments)
    assert (evaluated.code, evaluated.err) == (0, "")
    report = json.loads((tmp_path / "eval" / "eval.json").read_text())
    for name in ("samples", "loss", "map", "f1"):
        assert report[name] == pytest.approx(result[name], rel=1e-5)
    assert np.mean([entry["average_precision"] for entry in report["classes"]]) == pytest.approx(report["map"])
    assert f"mAP {report['map']:.2%}  F1 {report['f1']:.2%}" in evaluated.out
    assert "no confusion matrix, for images show several classes each\n" in evaluated.out
    assert [path.name for path in (tmp_path / "eval").iterdir()] == ["eval.json"]


def test_a_linear_probe_of_two_processes(world, dataset, tmp_path):
    small = ("--batch-size", 10, "--epochs", 1)
    done = world(1, "pt", "--shards", dataset, "--model", "test_resnet", *small, "--out", tmp_path / "pt")
    assert done.codes == [0], done.said()
    probe = ("ft", "--weights", tmp_path / "pt", "--data", f"shards:{dataset}", "--freeze", "backbone", *small)
    done = world(2, *probe, "--out", tmp_path / "ft")
    assert (done.codes, done.said()) == ([0, 0], "")
    before, after = state(tmp_path / "pt"), state(tmp_path / "ft")
    assert [name for name in after if not torch.equal(after[name], before[name])] == ["fc.weight", "fc.bias"]


def test_a_vit_with_a_sample_per_process_is_silent(world, dataset, tmp_path):
    """The gradient of its class token has other strides then, which DDP does not like."""
    done = world(2, "pt", "--shards", dataset, "--model", "test_vit", "--batch-size", 2, "--epochs", 1,
                 "--out", tmp_path / "run")  # fmt: skip
    assert (done.codes, done.said()) == ([0, 0], "")


@pytest.mark.parametrize("images", ["dataset", "several"])
def test_a_run_whose_weights_are_no_numbers_has_no_figures(fractaltrain, request, tmp_path, images):
    folder, run = request.getfixturevalue(images), tmp_path / "run"
    arguments = ("pt", "--shards", folder, "--model", "test_resnet", "--batch-size", 24, "--epochs", 1, "--out", run)
    assert fractaltrain(*arguments).code == 0
    [path] = list_checkpoints(run)
    saved = torch.load(path, weights_only=True)
    saved["model"]["fc.bias"][2] = torch.nan
    torch.save(saved, path)
    evaluated = fractaltrain("eval", "--weights", run, "--data", f"shards:{folder}", "--out", tmp_path / "e", "--quiet")
    assert (evaluated.code, evaluated.out) == (1, "")
    assert evaluated.err == (
        f"error: {run}: its loss on these images is nan, so its figures mean nothing; "
        "train it again with a lower --lr\n"
    )
    assert not (tmp_path / "e").exists()
