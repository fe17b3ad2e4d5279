"""The training loop in this process: what a run leaves, that it learns, stops on signals and resumes bit-exactly."""

import json
import multiprocessing
import os
import signal
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from fractalshards.errors import FractalError, StoppedError
from fractalshards.reader import Example
from fractaltrain import log, plotting
from fractaltrain import train as module
from fractaltrain.checkpoint import load_checkpoint
from fractaltrain.data.source import InMemorySource
from fractaltrain.log import append_metrics, read_metrics
from fractaltrain.plotting import draw_history
from fractaltrain.run_folder import list_checkpoints
from fractaltrain.stream.order import epoch_order
from tiny_training import RECIPE, SAMPLES, STEPS, assert_same_run, before_step, lines, run_tiny, squares, weights

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_run_folder_holds_checkpoints_metrics_and_result(tiny_run):
    assert {path.name for path in tiny_run.iterdir()} == {
        "run.json", "metrics.jsonl", "result.json", "history.png", "tb", ".lock",
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
    assert (result["epochs"], result["samples"]) == (2, 13)
    assert (result["top1"], result["top5"], result["loss"]) == (epochs[1]["top1"], 1.0, epochs[1]["loss"])
    assert result["best_top1"] == max(epoch["top1"] for epoch in epochs)
    assert epochs[result["best_epoch"] - 1]["top1"] == result["best_top1"]
    first, second, third = (line["loss"] for line in lines(tiny_run)[:3])
    assert epochs[0]["train_loss"] == pytest.approx((10 * first + 10 * second + 5 * third) / 25)


class TwoLabels(InMemorySource):
    """The squares, labelled with their class and the next one."""

    def read(self, index: int) -> Example:
        return super().read(index)._replace(label=tuple(sorted((index % 4, (index + 1) % 4))))


@pytest.mark.parametrize(("kind", "score"), [(InMemorySource, "top1"), (TwoLabels, "map")])
def test_training_learns(tmp_path, kind, score):
    """Chance is a top-1 of 0.25, or, where every image shows half of the classes, a mean average precision of 0.5."""
    splits = [kind("squares", source.images, source.labels, 4) for source in (squares(SAMPLES, 1), squares(40, 2))]
    recipe = replace(RECIPE, epochs=6, augment="none", lr=0.05)
    run_tiny(tmp_path, recipe, splits=splits, multi_label=kind is TwoLabels)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result[score] > (0.6 if score == "top1" else 0.75)
    losses = [line["train_loss"] for line in lines(tmp_path) if line["split"] == "epoch"]
    assert losses[-1] < 0.8 * losses[0]
    assert ("top1" in result, 0.5 < result.get("f1", 0) <= 1) == (score == "top1", score == "map")


def test_ema_follows_the_weights_and_is_evaluated(tmp_path, monkeypatch):
    """theta' = d theta' + (1 - d) theta, where d grows to the recipe's decay."""
    followed: list[torch.Tensor] = []
    wanted: list[torch.Tensor] = []
    train_step = module.train_step

    def watched(state, images, labels):
        if not wanted:
            wanted.append(state.model.fc.weight.detach().clone())
        loss = train_step(state, images, labels)
        decay = min(0.75, 1 - len(wanted) ** (-2 / 3))
        wanted.append(decay * wanted[-1] + (1 - decay) * state.model.fc.weight.detach())
        followed.append(state.evaluated.fc.weight.detach().clone())
        return loss

    monkeypatch.setattr(module, "train_step", watched)
    run_tiny(tmp_path / "run", replace(RECIPE, epochs=1, ema=0.75))
    assert len(followed) == STEPS
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(followed, wanted[1:], strict=True))
    saved = load_checkpoint(tmp_path / "run")
    assert torch.equal(saved.weights["fc.weight"], followed[-1])
    assert not torch.equal(saved.state["model"]["fc.weight"], followed[-1])


@pytest.mark.parametrize(("line", "workers"), [(1, 0), (3, 1), (6, 2)])
def test_resume_is_bit_exact(tiny_run, tmp_path, monkeypatch, line, workers):
    """Killed before a line of the metrics: in mid-epoch, at the end of an epoch, in the last one."""
    folder = tmp_path / "run"
    written = count()

    def killed(where: Path, content: dict) -> None:
        if next(written) == line:
            raise KeyboardInterrupt
        append_metrics(where, content)

    monkeypatch.setattr(log, "append_metrics", killed)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(folder)
    monkeypatch.undo()
    torch.manual_seed(12345)  # nothing may depend on what the process did before
    np.random.seed(1)
    run_tiny(folder, workers=workers)
    assert_same_run(folder, tiny_run)


MIXING = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "erasing": 0.25, "repeats": 3}
AUGMENTED = replace(RECIPE, augment="none", crop="resized", hflip=0.5, **MIXING)


@pytest.mark.parametrize(
    "recipe",
    [
        replace(AUGMENTED, ema=0.9, randaugment=9.0),
        replace(AUGMENTED, color_jitter=0.3),
        replace(RECIPE, optimizer="adamw", schedule="cosine", warmup_epochs=1, lr=0.001),
        replace(RECIPE, schedule="step", milestones=(1, 2)),
    ],
    ids=["ema-randaugment", "jitter", "adamw-cosine", "step"],
)
def test_resume_of_other_recipes_is_bit_exact(tmp_path, interrupted, recipe):
    run_tiny(tmp_path / "whole", recipe)
    interrupted(25 + 14, tmp_path / "killed", recipe)
    torch.manual_seed(1)
    np.random.seed(1)
    run_tiny(tmp_path / "killed", recipe, workers=2)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(("step", "number"), [(7, signal.SIGTERM), (20, signal.SIGUSR1), (25, signal.SIGTERM)])
def test_signal_saves_after_the_step_and_resume_is_bit_exact(tiny_run, tmp_path, monkeypatch, step, number):
    folder = tmp_path / "run"
    handler = signal.getsignal(number)
    before_step(monkeypatch, 25 + step, lambda: signal.raise_signal(number))
    with pytest.raises(StoppedError, match=number.name) as error:
        run_tiny(folder)
    assert error.value.code == 75
    assert signal.getsignal(number) == handler
    assert list_checkpoints(folder)[-1].name == f"checkpoint-0001-{step:07d}.pt"
    monkeypatch.undo()
    run_tiny(folder, resume="must")
    assert_same_run(folder, tiny_run)


def test_signal_during_evaluation_saves_before_it(tiny_run, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    evaluate, calls = module.evaluate, count(1)

    def signalled(*arguments):
        if next(calls) == 2:
            signal.raise_signal(signal.SIGUSR1)
        return evaluate(*arguments)

    monkeypatch.setattr(module, "evaluate", signalled)
    with pytest.raises(StoppedError):
        run_tiny(folder)
    assert list_checkpoints(folder)[-1].name == "checkpoint-0001-0000025.pt"
    monkeypatch.undo()
    run_tiny(folder)
    assert_same_run(folder, tiny_run)


def test_error_leaves_no_loader_workers(tmp_path, monkeypatch):
    """They ignore SIGTERM: the interpreter would wait for them forever at its end."""
    before = {*multiprocessing.active_children()}
    monkeypatch.setattr(module, "save_checkpoint", Mock(side_effect=FractalError("no room")))  # during an epoch
    with pytest.raises(FractalError, match="no room") as stopped:
        run_tiny(tmp_path / "run", workers=1)
    assert {*multiprocessing.active_children()} <= before
    assert stopped.traceback


@pytest.mark.parametrize("command", ["pt --shards DATASET", "ft --weights none --data shards:DATASET"])
def test_seed_decides_weights_order_and_augmentation(fractaltrain, dataset, tmp_path, monkeypatch, command):
    batches, states = [], []
    train_batch, stop = module.train_batch, Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(module, "train_batch", lambda batch, *more: batches.append(batch) or train_batch(batch, *more))
    monkeypatch.setattr(module, "train_step", lambda state, *more: states.append(state) or stop())
    words = [word.replace("DATASET", str(dataset)) for word in command.split()]
    for number, seed in enumerate((0, 0, 1)):
        options = ("--model", "test_resnet", "--batch-size", 10, "--seed", seed, "--out", tmp_path / f"{number}")
        assert fractaltrain(*words, *options).code == 130
    for first, again, other in (
        [batch.keys for batch in batches],
        [{*batch.sample_keys.tolist()} for batch in batches],
        [next(state.model.parameters()).tolist() for state in states],
    ):
        assert (first == again, first == other) == (True, False)


def test_eval_every_changes_nothing_but_the_evaluations(tmp_path):
    recipe = replace(RECIPE, epochs=3)
    for name, every in (("all", 1), ("few", 2)):
        run_tiny(tmp_path / name, recipe, eval_every=every)
    everything, few = ([line for line in lines(tmp_path / name) if line["split"] == "epoch"] for name in ("all", "few"))
    assert [line["train_loss"] for line in few] == [line["train_loss"] for line in everything]
    assert ["top1" in line for line in few] == [False, True, True]
    assert [line["top1"] for line in few[1:]] == [line["top1"] for line in everything[1:]]


def test_deterministic_run_in_bf16_with_pad_and_without_val_split(tmp_path, monkeypatch):
    """The last batch is filled up; the result is the training loss."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    options = {"pad": True, "amp": "bf16", "deterministic": True}
    run_tiny(tmp_path, replace(RECIPE, epochs=1), splits=(squares(SAMPLES, 1), None), **options)
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert lines(tmp_path)[-1]["step"] == 26
    assert set(json.loads((tmp_path / "result.json").read_text())) == {"epochs", "train_loss"}
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["precision"] == "torch.bfloat16"


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}])
def test_divergence_names_step_rate_and_samples(tmp_path, mixing):
    with pytest.raises(FractalError) as error:
        run_tiny(tmp_path / "run", replace(RECIPE, lr=1e30, **mixing))
    order = epoch_order((SAMPLES,), seed=0, epoch=0, window=1)
    for noun in ("epoch 1, step 2", "1.81e+29", *(f"squares/{sample:06d}" for sample in order[4:8])):
        assert noun in str(error.value)
    assert list_checkpoints(tmp_path / "run") == []
    assert not (tmp_path / "run" / "result.json").exists()


def plain() -> nn.Module:
    """A model without batch norm and dropout, for which parts of a batch are batches of their own."""
    features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(OrderedDict(features=features, fc=nn.Linear(8, 4)))


def test_accumulation_gives_the_same_weights(tmp_path):
    for accumulate in (1, 4):
        run_tiny(tmp_path / str(accumulate), model=plain, accumulate=accumulate)
    expected = weights(tmp_path / "1")
    for name, tensor in weights(tmp_path / "4").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5)


def test_clip_grad_bounds_a_step(tmp_path):
    """The first step of SGD moves the weights by lr times the gradient norm."""
    recipe = replace(RECIPE, epochs=1, batch_size=102, lr=0.1, div_factor=1.0, final_div_factor=1.0)
    recipe = replace(recipe, weight_decay=0.0, head_weight_decay=None, head_lr_factor=1.0)
    torch.manual_seed(0)
    before = plain().state_dict()
    run_tiny(tmp_path / "run", replace(recipe, clip_grad=1e-2), model=plain)
    moves = [(after - before[name]).flatten() for name, after in weights(tmp_path / "run").items()]
    assert float(torch.cat(moves).norm()) == pytest.approx(0.1 * 1e-2, rel=1e-2)


def test_compiled_run_can_continue_without_compile(tmp_path, tiny_run, interrupted, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # inductor takes half a minute
    interrupted(22, tmp_path / "run", compile=True)
    run_tiny(tmp_path / "run")
    for line, expected in zip(lines(tmp_path / "run"), lines(tiny_run), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)


# The log


def test_log_on_a_terminal_keeps_messages_on_separate_lines(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with log.RunLog(tmp_path, 3, 100, 8, log.Position(), main=True, quiet=False) as run_log:
        run_log.step(0, 10, 0.1, 0.05)
        run_log.message("saved")
        run_log.step(0, 20, 0.1, 0.05)
    first, message, second, end = capfd.readouterr().out.split("\n")
    assert first.startswith("\r\033[Kepoch 1/3  step 10/100")
    assert (message, end) == ("saved", "")
    assert second.startswith("\r\033[Kepoch 1/3  step 20/100")


def test_ctrl_c_does_not_wait_for_tensorboard(tmp_path, monkeypatch):
    """Its writing thread may have missed that there is something to write, and sleep."""
    run_log = log.RunLog(tmp_path, 3, 100, 8, log.Position(), main=True, quiet=False)
    monkeypatch.setattr(run_log._tensorboard, "close", Mock(side_effect=AssertionError))
    with pytest.raises(KeyboardInterrupt), run_log:
        raise KeyboardInterrupt


def test_ctrl_c_that_a_library_swallows_ends_the_training(tmp_path, monkeypatch):
    def swallow() -> None:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)

    before_step(monkeypatch, STEPS + 12, swallow)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "run")
    assert lines(tmp_path / "run")[-1]["global_step"] == STEPS + 10
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_timer_separates_waiting_from_training(monkeypatch):
    monkeypatch.setattr(log, "time", Mock(monotonic=Mock(side_effect=[0, 1, 4, 4, 104, 104, 106, 106])))
    timer = log.Timer(batch_size=8)
    timer.loaded()
    timer.stepped()
    assert timer.lap() == {"images_per_s": 2.0, "waiting": 0.25}
    timer.start()  # after an evaluation
    timer.loaded()
    timer.stepped()
    assert timer.lap() == {"images_per_s": 4.0, "waiting": 0.0}
    assert timer.seconds_per_step() == 6 / 2


def test_tensorboard_shows_every_step_once_after_a_resume(tmp_path, interrupted):
    interrupted(25 + 19, tmp_path / "run", save_every_minutes=10.0)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-0001-0000000.pt"]  # by the clock
    run_tiny(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tb")).Reload()
    expected = {"train/loss", "train/lr", "train/images_per_s", "train/waiting"}
    assert set(events.Tags()["scalars"]) == expected | {
        f"epoch/{name}" for name in ("train_loss", "samples", "loss", "top1", "top5")
    }
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    wanted = [(line["global_step"], line["loss"]) for line in lines(tmp_path / "run") if line["split"] == "train"]
    assert [step for step, _ in shown] == [step for step, _ in wanted]
    assert [value for _, value in shown] == pytest.approx([value for _, value in wanted])


def test_history_that_cannot_be_drawn_does_not_end_a_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(log, "draw_history", Mock(side_effect=ValueError("no font\nat all")))
    run_tiny(tmp_path / "run", replace(RECIPE, epochs=1))
    out = capfd.readouterr().out
    assert ("history.png: not drawn (no font at all)" in out, "\r" in out) == (True, False)  # this is no terminal
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("epochs", [0, 1, 3])
@pytest.mark.parametrize("scores", [{"samples": 5, "loss": 1.2, "top1": 0.5, "top5": 0.9}, {}], ids=["val", "no val"])
def test_history_is_drawn_for_any_run(tmp_path, monkeypatch, epochs, scores):
    figures = []
    save = plotting.save
    monkeypatch.setattr(plotting, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    for epoch in range(epochs):
        for step in (10, 20):
            where = {"epoch": epoch, "step": step, "global_step": 20 * epoch + step}
            rates = {"images_per_s": 100.0 + step, "waiting": 0.1}
            append_metrics(tmp_path, {"split": "train", **where, "loss": 2 - epoch / 5, "lr": 0.1, **rates})
        append_metrics(tmp_path, {"split": "epoch", **where, "train_loss": 1.9 - epoch / 5, **scores})
    draw_history(tmp_path / "history.png", read_metrics(tmp_path))
    with Image.open(tmp_path / "history.png") as picture:
        assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 50
    for panel in figures[0].axes:
        if legend := panel.get_legend():
            assert not legend.get_window_extent().overlaps(panel.get_window_extent())  # it covers no curve
