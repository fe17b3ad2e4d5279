"""The loop itself, in this process: what a run leaves behind, that it learns, and that it continues bit for bit."""

import json
import multiprocessing
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fractalshards.errors import FractalError
from fractaltrain import log as history
from fractaltrain import log as report
from fractaltrain import train as module
from fractaltrain.checkpoint import load_checkpoint, model_weights
from fractaltrain.data.source import ArraySource, Example
from fractaltrain.train import Learner, train
from tiny_job import ALONE, RECIPE, STEPS, job, lines, source, stop_before, weights

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_what_a_run_leaves_behind(tiny_run, capfd):
    assert {path.name for path in tiny_run.iterdir()} == {
        "run.json", "metrics.jsonl", "result.json", "history.png", "tb",
        "checkpoint-0001-0000010.pt", "checkpoint-0001-0000020.pt", "checkpoint-0002-0000000.pt",
    }  # fmt: skip

    steps = [(line["split"], line["epoch"], line["step"], line["global_step"]) for line in lines(tiny_run)]
    assert steps == [
        *[("train", 0, step, step) for step in (10, 20, 25)],
        ("epoch", 0, 25, 25),
        *[("train", 1, step, 25 + step) for step in (10, 20, 25)],
        ("epoch", 1, 25, 50),
    ]
    epochs = [line for line in lines(tiny_run) if line["split"] == "epoch"]
    result = json.loads((tiny_run / "result.json").read_text())
    assert result["epochs"] == 2
    assert result["samples"] == 13
    assert (result["top1"], result["top5"], result["loss"]) == (epochs[1]["top1"], 1.0, epochs[1]["loss"])
    assert result["best_top1"] == max(epoch["top1"] for epoch in epochs)
    assert epochs[result["best_epoch"] - 1]["top1"] == result["best_top1"]
    first, second, third = (line["loss"] for line in lines(tiny_run)[:3])
    mean = (10 * first + 10 * second + 5 * third) / 25
    assert epochs[0]["train_loss"] == pytest.approx(mean)


def test_it_learns(tmp_path):
    train(job(tmp_path / "run", replace(RECIPE, epochs=6, augment="none", lr=0.05)), ALONE)
    losses = [line["train_loss"] for line in lines(tmp_path / "run") if line["split"] == "epoch"]
    assert losses[-1] < 0.8 * losses[0]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["top1"] > 0.6


@pytest.mark.parametrize("line", range(8))
def test_killed_run_continues_bit_for_bit(tiny_run, tmp_path, monkeypatch, line):
    """Stop before any line of the metrics is written; what was done since the last checkpoint is done again."""
    folder = tmp_path / "run"
    written = []

    def killed(where: Path, content: dict) -> None:
        if len(written) == line:
            raise KeyboardInterrupt
        written.append(content)
        append(where, content)

    append = report.append_metrics
    monkeypatch.setattr(report, "append_metrics", killed)
    with pytest.raises(KeyboardInterrupt):
        train(job(folder), ALONE)
    monkeypatch.undo()
    torch.manual_seed(12345)  # nothing may depend on what the process did before
    train(job(folder, workers=line % 3), ALONE)
    assert lines(folder) == lines(tiny_run)
    expected = weights(tiny_run)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder).items())
    assert (folder / "result.json").read_text() == (tiny_run / "result.json").read_text()


@dataclass(frozen=True)
class Shows:
    """The squares, labelled with all of their class and the next one."""

    squares: ArraySource

    lengths = property(lambda self: self.squares.lengths)
    classes = property(lambda self: self.squares.classes)

    def read(self, index: int) -> Example:
        key, image, label = self.squares.read(index)
        return Example(key, image, tuple(sorted((label, (label + 1) % 4))))


def test_images_of_several_classes(tmp_path):
    """Half the classes are shown by each image: guessing ranks no better than 0.5."""
    recipe = replace(RECIPE, epochs=6, augment="none", lr=0.05)
    squares = replace(job(tmp_path / "run", recipe), multi_label=True)
    train(replace(squares, training=Shows(squares.training), held_out=Shows(source(40, 2))), ALONE)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["map"] > 0.75
    assert 0.5 < result["f1"] <= 1
    assert result["best_map"] >= result["map"]
    assert "top1" not in result


def test_averaged_weights_are_what_counts(tmp_path, monkeypatch):
    """They are evaluated and kept, and follow the weights: theta' = decay theta' + (1 - decay) theta.

    The decay grows to what the recipe says."""
    recipe = replace(RECIPE, epochs=1, ema=0.75)
    followed: list[torch.Tensor] = []
    wanted: list[torch.Tensor] = []
    learn = Learner.learn

    def watched(self, images, labels):
        if not wanted:
            wanted.append(self.model.fc.weight.detach().clone())
        loss = learn(self, images, labels)
        decay = min(0.75, 1 - len(wanted) ** (-2 / 3))
        wanted.append(decay * wanted[-1] + (1 - decay) * self.model.fc.weight.detach())
        followed.append(self.averaged.module.fc.weight.detach().clone())
        return loss

    monkeypatch.setattr(Learner, "learn", watched)
    train(job(tmp_path / "run", recipe), ALONE)
    assert len(followed) == STEPS
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(followed, wanted[1:], strict=True))
    saved = load_checkpoint(tmp_path / "run")
    assert saved is not None
    assert torch.equal(model_weights(saved)["fc.weight"], followed[-1])
    assert not torch.equal(saved.state["model"]["fc.weight"], followed[-1])
    assert saved.state["settings"]["recipe"]["ema"] == 0.75


@pytest.mark.parametrize("jitter", [{"ema": 0.9, "randaugment": 9.0}, {"color_jitter": 0.3}])
def test_all_augmentation_continues_bit_for_bit(tmp_path, monkeypatch, jitter):
    mixing = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "erasing": 0.25, "repeats": 3}
    recipe = replace(RECIPE, augment="none", crop="resized", **mixing, **jitter)
    train(job(tmp_path / "whole", recipe), ALONE)

    def killed(folder: Path, position, state, keep) -> None:
        save(folder, position, state, keep)
        if (position.epoch, position.step) == (1, 10):
            raise KeyboardInterrupt

    save = module.save_checkpoint
    monkeypatch.setattr(module, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train(job(tmp_path / "killed", recipe), ALONE)
    monkeypatch.setattr(module, "save_checkpoint", save)
    torch.manual_seed(1)
    np.random.seed(1)
    train(job(tmp_path / "killed", recipe, workers=2), ALONE)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "killed").items())


def test_an_error_leaves_no_loader_workers(tmp_path, monkeypatch):
    """The interpreter would wait for them for ever at its end, for they ignore SIGTERM."""
    before = {*multiprocessing.active_children()}

    def fail(*_: object) -> None:
        raise FractalError("no room")

    monkeypatch.setattr(module, "save_checkpoint", fail)  # in the middle of an epoch
    with pytest.raises(FractalError, match="no room") as stopped:
        train(job(tmp_path / "run", workers=1), ALONE)
    assert {*multiprocessing.active_children()} <= before
    assert stopped.traceback


def test_other_seeds_train_otherwise(tiny_run, tmp_path):
    train(job(tmp_path / "run", seed=1), ALONE)
    assert not torch.equal(weights(tmp_path / "run")["fc.weight"], weights(tiny_run)["fc.weight"])


def test_run_without_a_picture_goes_on(tmp_path, monkeypatch, capfd):
    def broken(folder: Path) -> None:
        raise ValueError("no font\nat all")

    monkeypatch.setattr(history, "draw_history", broken)
    train(job(tmp_path / "run", replace(RECIPE, epochs=1)), ALONE)
    assert "run/history.png: not drawn (no font at all); training goes on\n" in capfd.readouterr().out
    assert (tmp_path / "run" / "result.json").exists()


def test_tensorboard_shows_every_step_once(tmp_path, monkeypatch):
    """After a kill and a resume, which writes some steps again."""
    folder = tmp_path / "run"
    stop_before(monkeypatch, 1, 19)
    with pytest.raises(KeyboardInterrupt):
        train(job(folder, save_every_minutes=10.0), ALONE)
    monkeypatch.undo()
    train(job(folder), ALONE)
    events = EventAccumulator(str(folder / "tb")).Reload()
    expected = {"train/loss", "train/lr", "train/images_per_s", "train/waiting"}
    expected |= {f"epoch/{name}" for name in ("train_loss", "samples", "loss", "top1", "top5")}
    assert set(events.Tags()["scalars"]) == expected
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    wanted = [(line["global_step"], line["loss"]) for line in lines(folder) if line["split"] == "train"]
    assert [step for step, _ in shown] == [step for step, _ in wanted]
    assert [value for _, value in shown] == pytest.approx([value for _, value in wanted])


def test_padded_epochs_have_a_step_more(tmp_path):
    train(job(tmp_path / "run", replace(RECIPE, epochs=1), pad=True), ALONE)
    assert lines(tmp_path / "run")[-1]["step"] == 26


def test_without_held_out_images_the_result_is_the_training_loss(tmp_path):
    train(job(tmp_path / "run", replace(RECIPE, epochs=1), held_out=False), ALONE)
    assert set(json.loads((tmp_path / "run" / "result.json").read_text())) == {"epochs", "train_loss"}


def test_log_without_a_terminal_has_no_carriage_returns(tmp_path, capfd):
    train(job(tmp_path / "run", replace(RECIPE, epochs=1)), ALONE)
    out = capfd.readouterr().out
    assert "\r" not in out
    first = out.splitlines()[0]
    assert first.startswith("epoch 1/1  step 25/25  loss ")
    assert re.search(r"images/s  \d+% waiting for data  0:00:00 left$", first)
