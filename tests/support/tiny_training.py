"""A training run of a few seconds, whose model has state that resuming must restore: batch norm, dropout."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fractalshards.reader import Example
from fractaltrain import train as module
from fractaltrain.checkpoint import load_checkpoint
from fractaltrain.config import ImagesConfig, ModelConfig, RunConfig, TrainConfig
from fractaltrain.data.source import InMemorySource, SampleSource, Splits
from fractaltrain.distributed import World
from fractaltrain.log import read_metrics
from fractaltrain.recipes import FT_RECIPES
from fractaltrain.recipes.recipe import TrainRecipe

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
RECIPE = replace(FT_RECIPES["anderson"], epochs=2, batch_size=4)
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


class Deadly(InMemorySource):
    """Samples of which one kills the loader worker that reads it."""

    def read(self, index: int) -> Example:
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


def squares(count: int, seed: int) -> InMemorySource:
    """Draw squares of four colours in noise."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = generator.integers(0, 120, (count, 16, 16, 3), np.uint8)
    images[np.arange(count), 4:12, 4:12, labels % 3] += (40 + 45 * (labels // 3)).astype(np.uint8)[:, None, None]
    return InMemorySource("squares", images, labels, 4)


def run_tiny(
    folder: Path,
    recipe: TrainRecipe = RECIPE,
    seed: int = 0,
    model: Callable[[], nn.Module] = Tiny,
    splits: tuple[SampleSource, SampleSource | None] | None = None,
    multi_label: bool = False,
    world: World = ALONE,
    **run: object,
) -> None:
    """Train in ``folder``, with checkpoints after every ten steps."""
    settings = {"out": folder, "seed": seed, "save_every_minutes": 0.0} | run
    config = TrainConfig(ImagesConfig("squares", None, 0, folder), ModelConfig("tiny"), recipe, RunConfig(**settings))
    train, val = splits or (squares(SAMPLES, 1), squares(13, 2))
    torch.manual_seed(seed)
    module.train(config, model(), Splits(train, val, multi_label=multi_label), 16, {"task": "test"}, world)


def lines(folder: Path) -> list[dict]:
    """Return the metrics, without those that depend on the machine."""
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "waiting")} for line in read_metrics(folder)]


def before_step(monkeypatch: pytest.MonkeyPatch, call: int, act: Callable[[], object]) -> None:
    """Call ``act`` before step ``call`` of this process, counted from 1."""
    train_step, calls = module.train_step, count(1)

    def acting(*arguments: object) -> torch.Tensor:
        if next(calls) == call:
            act()
        return train_step(*arguments)

    monkeypatch.setattr(module, "train_step", acting)


def weights(folder: Path, part: str = "model") -> dict[str, torch.Tensor]:
    saved = load_checkpoint(folder)
    assert saved is not None
    return saved.state[part]


def assert_same_run(folder: Path, expected: Path) -> None:
    """Assert that two runs have bit-identical metrics, weights and results."""
    assert lines(folder) == lines(expected)
    wanted = weights(expected)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(folder).items())
    assert (folder / "result.json").read_text() == (expected / "result.json").read_text()
