"""The loop itself, in this process, with a model that has everything a resume could get wrong: batch norm, dropout."""

import json
import multiprocessing
import os
import re
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from fractalshards.errors import FractalError, StoppedError, UsageError
from fractaltrain import history, report
from fractaltrain import train as module
from fractaltrain.checkpoint import list_checkpoints, load_checkpoint, model_weights
from fractaltrain.data.source import ArraySource, Example
from fractaltrain.learner import Learner
from fractaltrain.recipes import FINETUNING
from fractaltrain.recipes.recipe import Recipe
from fractaltrain.run_folder import read_metrics
from fractaltrain.settings import Running
from fractaltrain.stream.order import epoch_order
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
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "waiting")} for line in read_metrics(folder)]


def during_step(monkeypatch: pytest.MonkeyPatch, epoch: int, step: int, act: Callable[[], object]) -> None:
    """Call ``act`` when the loop has fetched the batch of that step, counted from 1."""

    def acting(batches, start, loading):
        for number, batch in enumerate(iterate(batches, start, loading), start + 1):
            if (batches._epoch, number, len(batches)) == (epoch, step, STEPS):
                act()
            yield batch

    iterate = module.iterate
    monkeypatch.setattr(module, "iterate", acting)


def stop_before(monkeypatch: pytest.MonkeyPatch, epoch: int, step: int) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    during_step(monkeypatch, epoch, step, stop)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved = load_checkpoint(folder)
    assert saved is not None
    return saved.state["model"]


@pytest.fixture(autouse=True)
def no_pictures(undisturbed, monkeypatch):
    """They take longer than these runs; the undisturbed one has its picture."""
    monkeypatch.setattr(history, "draw_history", lambda folder: None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    train(job(folder), ALONE)
    return folder


def test_what_a_run_leaves_behind(undisturbed, capfd):
    assert {path.name for path in undisturbed.iterdir()} == {
        "run.json", "metrics.jsonl", "result.json", "history.png", "tb",
        "checkpoint-0001-0000010.pt", "checkpoint-0001-0000020.pt", "checkpoint-0002-0000000.pt",
    }  # fmt: skip

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

    append = report.append_metrics
    monkeypatch.setattr(report, "append_metrics", killed)
    with pytest.raises(KeyboardInterrupt):
        train(job(folder), ALONE)
    monkeypatch.undo()
    torch.manual_seed(12345)  # nothing may depend on what the process did before
    train(job(folder, workers=line % 3), ALONE)
    assert lines(folder) == lines(undisturbed)
    expected = weights(undisturbed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder).items())
    assert (folder / "result.json").read_text() == (undisturbed / "result.json").read_text()


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


def test_checkpoints_inside_an_epoch_are_used(tmp_path, monkeypatch, capfd):
    saves = []

    def save_and_stop(folder: Path, position, state, keep) -> None:
        save(folder, position, state, keep)
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
    monkeypatch.setattr(module, "save_checkpoint", lambda folder, position, *_: saves.append(position.step))
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
    before = [(path, path.stat().st_mtime_ns) for path in list_checkpoints(undisturbed)]
    with pytest.raises(FractalError, match=message):
        train(job(undisturbed, **changes), ALONE)
    assert [(path, path.stat().st_mtime_ns) for path in list_checkpoints(undisturbed)] == before


def test_other_seeds_train_otherwise(undisturbed, tmp_path):
    train(job(tmp_path / "run", seed=1), ALONE)
    assert not torch.equal(weights(tmp_path / "run")["fc.weight"], weights(undisturbed)["fc.weight"])


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}])
def test_loss_that_is_no_number_names_the_first_step_its_rate_and_its_samples(tmp_path, mixing):
    with pytest.raises(FractalError) as error:
        train(job(tmp_path / "run", replace(RECIPE, lr=1e30, **mixing)), ALONE)
    order = epoch_order((SAMPLES,), seed=0, epoch=0, window=1)
    second = ", ".join(f"squares/{sample:06d}" for sample in order[4:8])
    message = str(error.value)
    assert message.startswith("the loss is nan at epoch 1, step 2, learning rate 1.81e+29, on the samples ")
    assert f"samples {second}; lower --lr" in message
    assert list_checkpoints(tmp_path / "run") == []
    assert not (tmp_path / "run" / "result.json").exists()


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "garbage": b"x" * 100}[how])


@pytest.mark.parametrize("how", ["cut", "empty", "garbage"])
def test_damaged_checkpoint_gives_way_to_the_one_before(undisturbed, tmp_path, monkeypatch, capfd, how):
    """Even with --keep 1 from then on, and the curve stays the same."""
    folder = tmp_path / "run"
    stop_before(monkeypatch, 1, 21)
    with pytest.raises(KeyboardInterrupt):
        train(job(folder), ALONE)
    monkeypatch.undo()
    assert [path.name[11:-3] for path in list_checkpoints(folder)] == ["0001-0000000", "0001-0000010", "0001-0000020"]
    damage(list_checkpoints(folder)[-1], how)
    capfd.readouterr()
    train(job(folder, keep=1), ALONE)
    out = capfd.readouterr().out.splitlines()
    assert out[0].startswith(f"{folder}/checkpoint-0001-0000020.pt: damaged (")
    assert out[0].endswith("); taking the one before")
    assert out[1] == f"{folder}: continuing at epoch 2, step 10"
    assert lines(folder) == lines(undisturbed)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-0002-0000000.pt"]


def test_nothing_but_damaged_checkpoints_is_one_line(tmp_path):
    folder = tmp_path / "run"
    train(job(folder, replace(RECIPE, epochs=1)), ALONE)
    for path in list_checkpoints(folder):
        damage(path, "cut")
    expected = rf"checkpoint-0001-0000000\.pt: damaged \(.*\), and so are 2 older ones; remove {folder} to start again"
    with pytest.raises(FractalError, match=expected) as error:
        train(job(folder, replace(RECIPE, epochs=1)), ALONE)
    assert "\n" not in str(error.value)


def test_foreign_checkpoint_is_one_line(undisturbed, tmp_path):
    """One of another model, and one that this software did not write."""
    folder = tmp_path / "run"
    train(job(folder, replace(RECIPE, epochs=1), keep=1), ALONE)
    (path,) = list_checkpoints(folder)
    state = torch.load(path, weights_only=True)
    for content, expected in (
        ({**state, "model": nn.Linear(3, 2).state_dict()}, r"of another run or model \(.*\); remove it, or choose"),
        ({**state, "format": 1}, "written by another version; choose another folder"),
        (state["model"], r"damaged \(no 'format'\); remove"),
    ):
        torch.save(content, path)
        with pytest.raises(FractalError, match=expected) as error:
            train(job(folder, replace(RECIPE, epochs=1)), ALONE)
        assert "\n" not in str(error.value)


def test_no_more_checkpoints_than_asked_for(tmp_path):
    train(job(tmp_path / "run", keep=2), ALONE)
    names = [path.name for path in list_checkpoints(tmp_path / "run")]
    assert names == ["checkpoint-0001-0000020.pt", "checkpoint-0002-0000000.pt"]


def test_resume_never_and_must(tmp_path):
    with pytest.raises(FractalError, match=r"run: no run to continue; check --out, or drop --resume must"):
        train(job(tmp_path / "run", resume="must"), ALONE)
    assert not (tmp_path / "run").exists()
    train(job(tmp_path / "run", replace(RECIPE, epochs=1), resume="never"), ALONE)
    with pytest.raises(FractalError, match=r"run: holds a run already; choose another folder with --out"):
        train(job(tmp_path / "run", replace(RECIPE, epochs=1), resume="never"), ALONE)
    train(job(tmp_path / "run", replace(RECIPE, epochs=1), resume="must"), ALONE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("step", [1, 7, 20, 25])
def test_signal_saves_after_the_step_and_the_curve_is_the_same(undisturbed, tmp_path, monkeypatch, capfd, step, number):
    folder = tmp_path / "run"
    before = signal.getsignal(number)
    during_step(monkeypatch, 1, step, lambda: signal.raise_signal(number))
    with pytest.raises(StoppedError, match=f"stopped by {number.name}; run the same command to continue") as error:
        train(job(folder), ALONE)
    assert error.value.code == 75
    assert signal.getsignal(number) == before
    assert capfd.readouterr().out.splitlines()[-1] == f"{folder}: saved at epoch 2, step {step}"
    monkeypatch.undo()
    train(job(folder, resume="must"), ALONE)
    assert lines(folder) == lines(undisturbed)
    expected = weights(undisturbed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder).items())


def test_signal_during_the_evaluation(undisturbed, tmp_path, monkeypatch):
    """It is given up, and done again by the same command."""
    folder = tmp_path / "run"
    seen: list[int] = []

    def signalled(batches, *arguments):
        if len(batches) == 1:  # of the held-out images
            seen.append(1)
            if len(seen) == 2:
                signal.raise_signal(signal.SIGUSR1)
        return iterate(batches, *arguments)

    iterate = module.iterate
    monkeypatch.setattr(module, "iterate", signalled)
    with pytest.raises(StoppedError):
        train(job(folder), ALONE)
    assert list_checkpoints(folder)[-1].name == "checkpoint-0001-0000025.pt"
    monkeypatch.undo()
    train(job(folder), ALONE)
    assert lines(folder) == lines(undisturbed)


class Plain(nn.Module):
    """Without batch norm and dropout, which see parts of a batch as batches of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.fc = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.conv(images).relu().mean((2, 3)))


def test_accumulation_changes_nothing_but_the_memory(tmp_path):
    results = []
    for accumulate in (1, 2, 4):
        folder = tmp_path / str(accumulate)
        torch.manual_seed(0)
        train(replace(job(folder, accumulate=accumulate), model=Plain()), ALONE)
        results.append((lines(folder), weights(folder)))
    (expected_lines, expected), *others = results
    for some_lines, some in others:
        for name, tensor in some.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)
        losses, lrs = ([line[name] for line in some_lines if name in line] for name in ("loss", "lr"))
        assert losses == pytest.approx([line["loss"] for line in expected_lines if "loss" in line], rel=1e-3)
        assert lrs == [line["lr"] for line in expected_lines if "lr" in line]


def test_accumulation_needs_equal_parts(tmp_path):
    with pytest.raises(UsageError, match="--accumulate 3 cannot cut a process's batch of 4 into equal parts"):
        train(job(tmp_path / "run", accumulate=3), ALONE)
    assert not (tmp_path / "run").exists()


def test_clipping_bounds_what_a_step_can_do(tmp_path):
    """Of plain SGD without decay, the first step moves the weights by no more than lr times the norm."""
    recipe = replace(RECIPE, epochs=1, batch_size=102, lr=0.1, div_factor=1.0, final_div_factor=1.0)
    recipe = replace(recipe, weight_decay=0.0, head_weight_decay=None, head_lr_factor=1.0)
    moved = []
    for clip_grad in (None, 1e-2):
        folder = tmp_path / str(clip_grad)
        some = replace(job(folder, replace(recipe, clip_grad=clip_grad), held_out=False), model=Plain())
        before = {name: tensor.clone() for name, tensor in some.model.state_dict().items()}
        train(some, ALONE)
        moved.append(torch.cat([(after - before[name]).flatten() for name, after in weights(folder).items()]).norm())
    assert float(moved[1]) == pytest.approx(0.1 * 1e-2, rel=1e-2)
    assert moved[0] > 10 * moved[1]


def test_deterministic_mode_repeats_itself_and_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    for name in ("a", "b"):
        train(job(tmp_path / name, replace(RECIPE, epochs=1), deterministic=True), ALONE)
        assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    assert json.loads((tmp_path / "a" / "run.json").read_text())["environment"]["deterministic"] is True


def test_compile_without_a_compiler_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(FractalError, match="--compile needs a C\\+\\+ compiler; install g"):
        train(job(tmp_path / "run", compile=True), ALONE)


def test_compiled_run_learns_the_same(tmp_path, undisturbed, monkeypatch):
    """Its checkpoints are those of any run: this one goes on without. Inductor would take half a minute here."""
    folder = tmp_path / "run"
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    stop_before(monkeypatch, 0, 21)
    with pytest.raises(KeyboardInterrupt):
        train(job(folder, compile=True), ALONE)
    monkeypatch.undo()
    train(job(folder), ALONE)
    for line, expected in zip(lines(folder), lines(undisturbed), strict=True):
        assert (line["split"], line["global_step"]) == (expected["split"], expected["global_step"])
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)


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
    assert outcome.err == f"error: {tmp_path / 'run' / 'checkpoint-0001-0000000.pt'}: File too large\n"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "metrics.jsonl", "tb"}
    assert fractaltrain(*arguments, "--epochs", 1, "--image-size", 16).code == 0


def test_checkpoint_cannot_run_code(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path(tmp_path / "pwned").touch, ())

    torch.save({"format": 2, "position": Malicious()}, tmp_path / "checkpoint-0001-0000000.pt")
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
    assert re.search(r"images/s  \d+% waiting for data  0:00:00 left$", first)
