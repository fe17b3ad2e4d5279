"""The loop itself, in this process, with a model that has everything a resume could get wrong: batch norm, dropout."""

import json
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fractalshards.errors import FractalError
from fractaltrain import train as module
from fractaltrain.checkpoint import FILE, load_checkpoint
from fractaltrain.data.source import ArraySource
from fractaltrain.recipes import FINETUNING
from fractaltrain.recipes.recipe import Recipe
from fractaltrain.run_folder import read_metrics
from fractaltrain.settings import Running
from fractaltrain.train import Job, train
from fractaltrain.world import World

ALONE = World(rank=0, size=1, local_size=1, device=torch.device("cpu"))
RECIPE = replace(FINETUNING["anderson"], epochs=2, batch_size=4)
SAMPLES, STEPS = 102, 25


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.dropout(self.norm(self.conv(images)).relu().mean((2, 3))))


def source(count: int, seed: int) -> ArraySource:
    """Squares of four colours in noise."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = generator.integers(0, 120, (count, 16, 16, 3), np.uint8)
    images[np.arange(count), 4:12, 4:12, labels % 3] += (40 + 45 * (labels // 3)).astype(np.uint8)[:, None, None]
    return ArraySource("squares", images, labels, 4)


def job(folder: Path, recipe: Recipe = RECIPE, held_out: bool = True, seed: int = 0, **changes) -> Job:
    running = Running(recipe=recipe, out=folder, seed=seed, pad=False, amp="auto", workers=None, save_every_minutes=0.0)
    torch.manual_seed(seed)
    return Job(
        running=replace(running, **changes),
        model=Tiny(),
        training=source(SAMPLES, 1),
        window=1,
        held_out=source(13, 2) if held_out else None,
        image_size=16,
        settings={"task": "test"},
    )


def lines(folder: Path) -> list[dict]:
    """The metrics without what depends on the machine."""
    return [{k: v for k, v in line.items() if k != "images_per_s"} for line in read_metrics(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved = load_checkpoint(folder)
    assert saved is not None
    return saved[1]["model"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(job(folder), ALONE)
    return folder


def test_what_a_run_leaves_behind(undisturbed, capfd):
    assert {path.name for path in undisturbed.iterdir()} == {"run.json", "metrics.jsonl", "result.json", FILE}
    steps = [(line["split"], line["epoch"], line["step"], line["global_step"]) for line in lines(undisturbed)]
    assert steps == [
        *[("train", 0, step, step) for step in (10, 20, 25)],
        ("epoch", 0, 25, 25),
        *[("train", 1, step, 25 + step) for step in (10, 20, 25)],
        ("epoch", 1, 25, 50),
    ]
    epochs = [line for line in lines(undisturbed) if line["split"] == "epoch"]
    result = json.loads((undisturbed / "result.json").read_text())
    assert result["epochs"] == 2
    assert result["samples"] == 13
    assert (result["top1"], result["top5"], result["loss"]) == (epochs[1]["top1"], 1.0, epochs[1]["loss"])
    assert result["best_top1"] == max(epoch["top1"] for epoch in epochs)
    assert epochs[result["best_epoch"] - 1]["top1"] == result["best_top1"]
    first, second, third = (line["loss"] for line in lines(undisturbed)[:3])
    mean = (10 * first + 10 * second + 5 * third) / 25
    assert epochs[0]["train_loss"] == pytest.approx(mean)


def test_it_learns(tmp_path):
    train(job(tmp_path / "run", replace(RECIPE, epochs=6, augment="none", lr=0.05)), ALONE)
    losses = [line["train_loss"] for line in lines(tmp_path / "run") if line["split"] == "epoch"]
    assert losses[-1] < 0.8 * losses[0]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["top1"] > 0.6


@pytest.mark.parametrize("line", range(8))
def test_killed_run_continues_bit_for_bit(undisturbed, tmp_path, monkeypatch, line):
    """Stop before any line of the metrics is written; what was done since the last checkpoint is done again."""
    folder = tmp_path / "run"
    written = []

    def killed(where: Path, content: dict) -> None:
        if len(written) == line:
            raise KeyboardInterrupt
        written.append(content)
        append(where, content)

    append = module.append_metrics
    monkeypatch.setattr(module, "append_metrics", killed)
    with pytest.raises(KeyboardInterrupt):
        train(job(folder), ALONE)
    monkeypatch.undo()
    torch.manual_seed(12345)  # nothing may depend on what the process did before
    train(job(folder, workers=line % 3), ALONE)
    assert lines(folder) == lines(undisturbed)
    expected = weights(undisturbed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder).items())
    assert (folder / "result.json").read_text() == (undisturbed / "result.json").read_text()


@pytest.mark.parametrize("jitter", [{"randaugment": 9.0}, {"color_jitter": 0.3}])
def test_all_augmentation_continues_bit_for_bit(tmp_path, monkeypatch, jitter):
    mixing = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "erasing": 0.25, "repeats": 3}
    recipe = replace(RECIPE, augment="none", crop="resized", **mixing, **jitter)
    train(job(tmp_path / "whole", recipe), ALONE)

    def killed(folder: Path, position, state) -> None:
        save(folder, position, state)
        if (position.epoch, position.step) == (1, 10):
            raise KeyboardInterrupt

    save = module.save_checkpoint
    monkeypatch.setattr(module, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train(job(tmp_path / "killed", recipe), ALONE)
    monkeypatch.undo()
    torch.manual_seed(1)
    np.random.seed(1)
    train(job(tmp_path / "killed", recipe, workers=2), ALONE)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "killed").items())


def test_checkpoints_inside_an_epoch_are_used(tmp_path, monkeypatch, capfd):
    saves = []

    def save_and_stop(folder: Path, position, state) -> None:
        save(folder, position, state)
        saves.append((position.epoch, position.step))
        if saves[-1] == (1, 20):
            raise KeyboardInterrupt

    save = module.save_checkpoint
    monkeypatch.setattr(module, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(job(tmp_path / "run"), ALONE)
    assert saves == [(0, 10), (0, 20), (1, 0), (1, 10), (1, 20)]
    monkeypatch.undo()
    capfd.readouterr()
    train(job(tmp_path / "run"), ALONE)
    assert "run: continuing at epoch 2, step 20\n" in capfd.readouterr().out


def test_long_intervals_save_after_epochs_only(tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr(module, "save_checkpoint", lambda folder, position, state: saves.append(position.step))
    train(job(tmp_path / "run", save_every_minutes=10.0), ALONE)
    assert saves == [0, 0]


def test_finished_run_is_not_trained_again(undisturbed, monkeypatch, capfd):
    monkeypatch.setattr(module, "epoch_order", None)  # would fail if an epoch began
    before = lines(undisturbed)
    train(job(undisturbed), ALONE)
    assert lines(undisturbed) == before
    assert "undisturbed: 2 epochs done" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": replace(RECIPE, lr=0.5)}, r"holds a run with recipe\.lr 0\.015, not 0\.5; choose another folder"),
        ({"seed": 1}, "holds a run with seed 0, not 1"),
        ({"pad": True, "seed": 1}, "holds a run with seed 0 and 1 more settings, not 1"),
    ],
)
def test_folder_of_another_run_is_refused(undisturbed, changes, message):
    before = (undisturbed / FILE).stat().st_mtime_ns
    with pytest.raises(FractalError, match=message):
        train(job(undisturbed, **changes), ALONE)
    assert (undisturbed / FILE).stat().st_mtime_ns == before


def test_other_seeds_train_otherwise(undisturbed, tmp_path):
    train(job(tmp_path / "run", seed=1), ALONE)
    assert not torch.equal(weights(tmp_path / "run")["fc.weight"], weights(undisturbed)["fc.weight"])


def test_loss_that_is_no_number_stops_the_run_and_leaves_no_checkpoint(tmp_path):
    with pytest.raises(FractalError, match=r"^the loss is nan at epoch 1, step 10, learning rate .*; lower --lr"):
        train(job(tmp_path / "run", replace(RECIPE, lr=1e30)), ALONE)
    assert not (tmp_path / "run" / FILE).exists()
    assert not (tmp_path / "run" / "result.json").exists()


def test_damaged_checkpoint_is_one_line(undisturbed, tmp_path):
    folder = tmp_path / "run"
    train(job(folder, replace(RECIPE, epochs=1)), ALONE)
    data = (folder / FILE).read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"x" * 100):
        (folder / FILE).write_bytes(damaged)
        with pytest.raises(FractalError, match=rf"{FILE}: damaged \(.*\); remove it to start again") as error:
            train(job(folder, replace(RECIPE, epochs=1)), ALONE)
        assert "\n" not in str(error.value)


def test_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, fractaltrain, dataset):
    """A limit on the size of files stands in for a full disk: the write fails in the same place."""
    arguments = ("pt", "--shards", dataset, "--model", "resnet10t", "--batch-size", 25, "--out", tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        outcome = fractaltrain(*arguments, "--epochs", 1, "--image-size", 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.code == 1
    assert outcome.err == f"error: {tmp_path / 'run' / FILE}: File too large\n"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "metrics.jsonl"}
    assert fractaltrain(*arguments, "--epochs", 1, "--image-size", 16).code == 0


def test_checkpoint_cannot_run_code(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path(tmp_path / "pwned").touch, ())

    torch.save({"format": 1, "position": Malicious()}, tmp_path / FILE)
    with pytest.raises(FractalError, match="damaged"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_padded_epochs_have_a_step_more(tmp_path):
    train(job(tmp_path / "run", replace(RECIPE, epochs=1), pad=True), ALONE)
    assert lines(tmp_path / "run")[-1]["step"] == 26


def test_without_held_out_images_the_result_is_the_training_loss(tmp_path):
    train(job(tmp_path / "run", replace(RECIPE, epochs=1), held_out=False), ALONE)
    assert set(json.loads((tmp_path / "run" / "result.json").read_text())) == {"epochs", "train_loss"}


def test_bf16_trains_on_a_cpu_and_fp16_is_refused(tmp_path):
    train(job(tmp_path / "run", replace(RECIPE, epochs=1), amp="bf16"), ALONE)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["precision"] == "torch.bfloat16"
    with pytest.raises(FractalError, match="--amp fp16 needs a GPU; choose bf16 or fp32"):
        train(job(tmp_path / "other", amp="fp16"), ALONE)


def test_log_without_a_terminal_has_no_carriage_returns(tmp_path, capfd):
    train(job(tmp_path / "run", replace(RECIPE, epochs=1)), ALONE)
    out = capfd.readouterr().out
    assert "\r" not in out
    first = out.splitlines()[0]
    assert first.startswith("epoch 1/1  step 25/25  loss ")
    assert "images/s  0:00:00 left" in first
