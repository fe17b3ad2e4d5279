"""A job of some seconds, with a model that has everything a resume could get wrong: batch norm, dropout."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fractaltrain import train as module
from fractaltrain.checkpoint import load_checkpoint
from fractaltrain.config import Running
from fractaltrain.data.source import ArraySource
from fractaltrain.distributed import World
from fractaltrain.recipes import FT_RECIPES
from fractaltrain.recipes.recipe import TrainRecipe
from fractaltrain.run_folder import read_metrics
from fractaltrain.train import Job

ALONE = World(rank=0, size=1, local_size=1, device=torch.device("cpu"))
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


def source(count: int, seed: int) -> ArraySource:
    """Squares of four colours in noise."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = generator.integers(0, 120, (count, 16, 16, 3), np.uint8)
    images[np.arange(count), 4:12, 4:12, labels % 3] += (40 + 45 * (labels // 3)).astype(np.uint8)[:, None, None]
    return ArraySource("squares", images, labels, 4)


def job(folder: Path, recipe: TrainRecipe = RECIPE, held_out: bool = True, seed: int = 0, **changes) -> Job:
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
