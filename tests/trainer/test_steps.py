"""What a step does: accumulated, clipped, compiled, in bf16, and with a loss that is no number."""

import json
import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from fractalshards.errors import FractalError, UsageError
from fractaltrain.checkpoint import list_checkpoints
from fractaltrain.stream.order import epoch_order
from fractaltrain.train import train
from tiny_job import ALONE, RECIPE, SAMPLES, job, lines, stop_before, weights

pytestmark = pytest.mark.usefixtures("no_pictures")


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
    with pytest.raises(UsageError, match="--accumulate 3"):
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


def test_compiled_run_learns_the_same(tmp_path, tiny_run, monkeypatch):
    """Its checkpoints are those of any run: this one goes on without. Inductor would take half a minute here."""
    folder = tmp_path / "run"
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    stop_before(monkeypatch, 0, 21)
    with pytest.raises(KeyboardInterrupt):
        train(job(folder, compile=True), ALONE)
    monkeypatch.undo()
    train(job(folder), ALONE)
    for line, expected in zip(lines(folder), lines(tiny_run), strict=True):
        assert (line["split"], line["global_step"]) == (expected["split"], expected["global_step"])
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_bf16_trains_on_a_cpu_and_fp16_is_refused(tmp_path):
    train(job(tmp_path / "run", replace(RECIPE, epochs=1), amp="bf16"), ALONE)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["precision"] == "torch.bfloat16"
    with pytest.raises(FractalError, match="--amp fp16 needs a GPU; choose bf16 or fp32"):
        train(job(tmp_path / "other", amp="fp16"), ALONE)
