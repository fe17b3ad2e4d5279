"""Datasets whose images show their class by their colour, and the report on one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result

from fractalshards.cli import main
from fractalshards.digest import mapping_digest
from fractalshards.manifest import sample_key, shard_name, write_manifest
from fractalshards.png import Pixels
from fractalshards.sample import Label, MultiLabel
from fractalshards.writer import write_shard

HOSTILE_NAME = "<script>window.hacked = 1</script>\"'><img src=x onerror='window.hacked = 2'>"
HOSTILE_VALUE = "</style></script><script>window.hacked = 3</script>{{ 7 * 7 }}"
NAMES = ("goldfish", HOSTILE_NAME, *(f"thing {index}" for index in range(2, 30)))


def color(label: int) -> tuple[int, int, int]:
    """A colour that tells the class of an image, and survives lossy compression."""
    return 40 * (label % 6) + 20, 40 * (label // 6 % 6) + 20, 128


def plain(label: int, side: int = 16) -> Pixels:
    return np.full((side, side, 3), color(label), np.uint8)


def write_dataset(
    folder: Path,
    shards: Sequence[Sequence[tuple[Pixels, Label]]],
    classes: int,
    recipe: dict[str, object] | None = None,
    **more: Any,
) -> Path:
    """A dataset with these images and labels; enough of one to be reported."""
    folder.mkdir()
    records = []
    keys = map(sample_key, range(10**9))
    for number, samples in enumerate(shards):
        keyed = [(next(keys), sample) for sample in samples]
        records.append(write_shard(folder, shard_name("train", number), classes, keyed).shard())
    recipe = recipe or {"kind": "test", "systems_digest": "0" * 32}
    multi = any(isinstance(label, MultiLabel) for samples in shards for _, label in samples)
    write_manifest(
        folder,
        {"train": records},
        recipe=recipe,
        recipe_digest=mapping_digest(recipe),
        label_type="multi" if multi else "single",
        classes=classes,
        image_size=None,
        **more,
    )
    return folder


def report(folder: Path, out: Path) -> Result:
    return CliRunner().invoke(main, ["report", str(folder), "--out", str(out), "--workers", "1"])
