"""Training on a GPU: precisions, NCCL, pinned memory, determinism, compilation, resuming, evaluation and export.

pytest -m gpu tests/trainer/test_gpu.py
FRACTALTRAIN_TEST_DEVICE=cpu pytest -m gpu tests/trainer/test_gpu.py    # rehearses what a CPU can do of it
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from fractalshards.errors import FractalError
from fractaltrain import distributed, log
from fractaltrain.config import RunConfig
from fractaltrain.distributed import World
from fractaltrain.models import create_model
from fractaltrain.optim import build_state, train_step
from fractaltrain.recipes import PT_RECIPES
from fractaltrain.stream.loader import Batch, epoch_loader
from fractaltrain.stream.order import training_positions
from fractaltrain.transforms import train_batch, val_transform
from tiny_training import ALONE, RECIPE, SAMPLES, Deadly, Tiny, assert_same_run, lines, run_tiny, squares, weights

pytestmark = pytest.mark.gpu

DEVICE = torch.device(os.environ.get("FRACTALTRAIN_TEST_DEVICE", "cuda"), 0)
ON_GPU = DEVICE.type == "cuda"
DEVICE = DEVICE if ON_GPU else torch.device("cpu")
WORLD = replace(ALONE, device=DEVICE)
NO_AUGMENTATION = replace(RECIPE, augment="none")
MIXING = {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
OPTIONS = ("--model", "test_resnet", "--epochs", 2, "--batch-size", 10, "--window", 2, "--workers", 2, "--nproc", 1)
PRECISIONS = ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.skipif(not ON_GPU, reason="fp16 needs a GPU"))]
NAMES = {"bf16": "torch.bfloat16", "fp16": "torch.float16", "auto": "torch.bfloat16" if ON_GPU else "torch.float32"}


@pytest.fixture(autouse=True)
def quick_and_independent() -> Iterator[None]:
    """No pictures, and no determinism that is left over from the test before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "draw_history", lambda *_: None)
        yield
    torch.use_deterministic_algorithms(False)


class Plain(Tiny):
    """Without dropout, whose random numbers are others on a GPU; two convolutions, so channels last there."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Identity()
        self.conv = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3))


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder) if line["split"] == "train"]


@contextmanager
def no_waiting() -> Iterator[None]:
    """Make everything an error for which the process waits for the GPU."""
    if not ON_GPU:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("amp", [*PRECISIONS, "auto"])
def test_training_learns(tmp_path, amp, clip_grad):
    run_tiny(
        tmp_path, replace(NO_AUGMENTATION, epochs=6, lr=0.05, clip_grad=clip_grad), world=WORLD, amp=amp, workers=2
    )
    epochs = [line["train_loss"] for line in lines(tmp_path) if line["split"] == "epoch"]
    assert epochs[-1] < 0.8 * epochs[0]
    assert json.loads((tmp_path / "result.json").read_text())["top1"] > 0.6
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert settings["precision"] == NAMES.get(amp, "torch.float32")
    assert all(tensor.device.type == "cpu" for tensor in weights(tmp_path).values())
    assert (weights(tmp_path, "scaler").get("scale", 0) > 0) == (amp == "fp16")


@pytest.mark.parametrize("workers", [0, 2])
def test_losses_are_those_of_a_cpu(tmp_path, workers):
    """Batches through pinned memory, mixed on the device; a GPU computes convolutions in TF32."""
    recipe = replace(NO_AUGMENTATION, **MIXING)
    run_tiny(tmp_path / "cpu", recipe, model=Plain, amp="fp32")
    run_tiny(tmp_path / "gpu", recipe, model=Plain, amp="fp32", world=WORLD, workers=workers)
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=0.02)


@pytest.mark.parametrize("amp", PRECISIONS)
def test_deterministic_resume_is_bit_exact(tmp_path, interrupted, amp):
    """With random numbers on the device: dropout, erasing."""
    recipe = replace(NO_AUGMENTATION, crop="resized", hflip=0.5, erasing=0.25, ema=0.9, randaugment=9.0, **MIXING)
    options = {"world": WORLD, "amp": amp, "deterministic": True}
    run_tiny(tmp_path / "whole", recipe, **options, workers=1)
    interrupted(25 + 14, tmp_path / "killed", recipe, **options)
    torch.manual_seed(12345)
    run_tiny(tmp_path / "killed", recipe, **options, workers=2)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("model", ["resnet50", "deit_small_patch16_224"])
def test_published_models_train_deterministically(model):
    """No operation of theirs lacks a deterministic implementation."""

    def train() -> list[torch.Tensor]:
        torch.manual_seed(0)
        created = create_model(model, 10, 64)
        state = build_state(created, PT_RECIPES["anderson"], RunConfig(Path(), deterministic=True), False, 100, WORLD)
        images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        labels = torch.arange(4, device=DEVICE)
        return [train_step(state, images, labels) for _ in range(3)]

    assert all(torch.equal(*pair) for pair in zip(train(), train(), strict=True))


def test_run_of_a_gpu_continues_on_a_cpu(tmp_path, interrupted):
    """Its weights and momenta are channels last, those of a CPU contiguous."""
    options = {"model": Plain, "amp": "fp32"}
    run_tiny(tmp_path / "whole", NO_AUGMENTATION, **options)
    interrupted(22, tmp_path / "moved", NO_AUGMENTATION, **options, world=WORLD)
    layouts = {tensor.is_contiguous() for tensor in weights(tmp_path / "moved").values() if tensor.ndim == 4}
    assert layouts == {not ON_GPU}
    run_tiny(tmp_path / "moved", NO_AUGMENTATION, **options)
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), rel=0.02)


def test_compiled_training_continues_without_compilation(tmp_path, interrupted):
    run_tiny(tmp_path / "eager", NO_AUGMENTATION, model=Plain, world=WORLD, amp="bf16")
    interrupted(22, tmp_path / "compiled", NO_AUGMENTATION, model=Plain, world=WORLD, amp="bf16", compile=True)
    run_tiny(tmp_path / "compiled", NO_AUGMENTATION, model=Plain, world=WORLD, amp="bf16")
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=0.05)


def fixed_batch() -> Batch:
    """A batch as the loader gives it: channels last, in pinned memory."""
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)).permute(0, 3, 1, 2)
    labels = torch.arange(8) % 5
    if ON_GPU:
        images, labels = images.pin_memory(), labels.pin_memory()
    return Batch(images, labels, tuple("abcdefgh"), np.arange(8, dtype=np.uint64), ())


@pytest.mark.parametrize(
    ("amp", "changes"),
    [
        ("bf16", {}),
        ("bf16", {"optimizer": "adamw", "schedule": "cosine", "ema": 0.9, "erasing": 0.5, **MIXING}),
        *([("fp16", {"optimizer": "adamw", "clip_grad": 1.0})] if ON_GPU else []),
    ],
)
def test_step_does_not_wait_for_the_gpu(amp, changes):
    """All work of a step is queued: pinned copies, mixing, clipping, averaging, loss scaling (but for SGD)."""
    recipe = replace(PT_RECIPES["anderson"], epochs=1, **changes)
    state = build_state(create_model("test_resnet", 5, 32), recipe, RunConfig(Path(), amp=amp), False, 100, WORLD)
    batch = fixed_batch()

    def step() -> torch.Tensor:
        torch.manual_seed(1)
        return train_step(state, *train_batch(batch, recipe, 5, DEVICE))

    for _ in range(3):
        step()
    with no_waiting():
        total = torch.zeros((), dtype=torch.float64, device=DEVICE)
        for _ in range(2):
            total += step().double()
    assert math.isfinite(float(total))
    layout = torch.channels_last if ON_GPU else torch.contiguous_format
    assert state.layout == layout
    momenta = [moment for slots in state.optimizer.state.values() for moment in slots.values()]
    filters = [tensor for tensor in (*momenta, *state.model.parameters()) if tensor.ndim == 4]
    assert len(filters) > 2
    assert all(tensor.is_contiguous(memory_format=layout) for tensor in filters)


@pytest.fixture
def one_process(tmp_path, monkeypatch) -> Iterator[World]:
    """A process group of one process, NCCL for GPUs, in a world that counts two: all its collectives run."""
    monkeypatch.setenv(distributed._STORE, f"file://{tmp_path}/store")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    group = distributed._connect(0, 1, DEVICE)
    yield replace(WORLD, size=2, _patient_group=group)
    torch.distributed.destroy_process_group()


def test_collectives(one_process):
    """Those of a step do not wait for the GPU."""
    here = torch.tensor([1.5, -2.0], device=DEVICE)
    assert one_process.sum(here.clone()).tolist() == [1.5, -2.0]
    one_process.broadcast(here)
    assert (one_process.max(15), one_process.share({"a": 1}), one_process.gather("b")[0]) == (15, {"a": 1}, "b")
    one_process.barrier()
    with one_process.main_first():
        assert one_process.from_main(lambda: 3) == 3
    loss = torch.ones((), device=DEVICE)
    one_process.sum(loss.double())
    with no_waiting():
        one_process.sum(loss.double())
        assert one_process.max(0) == 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ddp_and_sync_batchnorm_change_no_losses_of_one_process(one_process, accumulate):
    def train(world: World) -> list[float]:
        torch.manual_seed(0)
        run = RunConfig(Path(), amp="bf16", accumulate=accumulate, sync_batchnorm=ON_GPU and world is one_process)
        state = build_state(create_model("test_resnet", 5, 32), RECIPE, run, False, 100, world)
        batch = fixed_batch()
        return [float(train_step(state, *train_batch(batch, RECIPE, 5, DEVICE))) for _ in range(5)]

    expected = train(WORLD)
    assert train(one_process) == pytest.approx(expected, rel=0.05)


def pinned(source: object, workers: int) -> Iterator[Batch]:
    transform = val_transform(RECIPE, 16)
    positions = training_positions(SAMPLES, 6, 0, 1, pad=False)
    order = np.arange(SAMPLES)
    return epoch_loader(source, transform, positions, order, 0, 0, workers=workers, pin_memory=ON_GPU)


@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_are_those_of_the_source(workers):
    source = squares(SAMPLES, 1)
    for step, batch in enumerate(pinned(source, workers)):
        assert batch.images.is_pinned() == batch.labels.is_pinned() == ON_GPU
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        images = batch.images.to(DEVICE, non_blocking=True)
        samples = [source.read(6 * step + number) for number in range(6)]
        assert np.array_equal(images.cpu().permute(0, 2, 3, 1).numpy(), np.stack([sample.image for sample in samples]))
        assert batch.labels.tolist() == [sample.label for sample in samples]
    assert step == SAMPLES // 6 - 1


def test_killed_loader_worker_of_a_gpu_is_named():
    samples = squares(SAMPLES, 1)
    with pytest.raises(FractalError, match="SIGKILL"):
        list(pinned(Deadly("deadly", samples.images, samples.labels, 4), 2))


def test_run_is_evaluated_and_exported(fractaltrain, built, tmp_path):
    run, images = tmp_path / "run", f"shards:{built / 'single'}"
    assert fractaltrain("pt", "--shards", built / "single", *OPTIONS, "--amp", "bf16", "--out", run).code == 0
    result = json.loads((run / "result.json").read_text())
    command = ("eval", "--weights", run, "--data", images, "--out")
    evaluated = fractaltrain(*command, tmp_path / "here")
    assert evaluated.code == 0, evaluated.err
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    arguments = [sys.executable, "-m", "fractaltrain", *map(str, command), str(tmp_path / "cpu")]
    subprocess.run(arguments, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=120)
    for name in ("here", "cpu"):
        report = json.loads((tmp_path / name / "eval.json").read_text())
        assert report["samples"] == result["samples"] == 10
        assert report["loss"] == pytest.approx(result["loss"], rel=0.05)
    file = tmp_path / "model.safetensors"
    exported = fractaltrain("export", run, "--out", file)
    assert exported.code == 0, exported.err
    model = timm.create_model("test_resnet", num_classes=5, checkpoint_path=str(file)).to(DEVICE)
    assert all(torch.equal(tensor.cpu(), load_file(file)[name]) for name, tensor in model.state_dict().items())


def test_too_large_a_batch_is_one_line(fractaltrain, built, tmp_path):
    if not ON_GPU:
        pytest.skip("the memory of CPUs is not limited")
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    try:
        options = ("--model", "resnet50", "--image-size", 224, "--batch-size", 50, "--epochs", 1, "--nproc", 1)
        outcome = fractaltrain("pt", "--shards", built / "single", *options, "--out", tmp_path / "run")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert outcome.code == 1
    *_, last = outcome.err.splitlines()
    assert last.startswith("error: ")
    assert "--batch-size" in last


def test_two_gpus_train_one_model(built, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    options = (*OPTIONS, "--sync-batchnorm", "--nproc", 2, "--out", tmp_path / "run")
    command = ("pt", "--shards", built / "single", *options)
    arguments = [sys.executable, "-m", "fractaltrain", *map(str, command)]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert all(map(math.isfinite, losses(tmp_path / "run")))
