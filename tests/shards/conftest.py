"""Small datasets of random images, and packed JPEGs."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fractalshards import workers
from fractalshards.digest import mapping_digest, systems_digest
from fractalshards.manifest import RECIPE, SYSTEMS, DatasetInfo, sample_key, shard_name, write_manifest
from fractalshards.sample import Label, LabelType, MultiLabel, Object
from fractalshards.storage import write_json
from fractalshards.systems import write_systems
from fractalshards.writer import write_shard
from packing import CLASSES as FLOWERS
from packing import Make, pack

CLASSES = 3


def write_small(folder: Path, labels: Sequence[Label], shard_size: int) -> Path:
    """Write random images of 16 x 16 pixels with these labels, of three classes, and all that describes them."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    systems = [rng.random((2, 2, 3)) for _ in range(CLASSES)]
    recipe = {"kind": "random", "n": len(labels), "systems_digest": systems_digest(systems)}
    write_systems(folder / SYSTEMS, systems)
    write_json(folder / RECIPE, {"recipe": recipe, "recipe_digest": mapping_digest(recipe)})
    records = []
    for first in range(0, len(labels), shard_size):
        samples = [
            (sample_key(index), (rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), label))
            for index, label in enumerate(labels[first : first + shard_size], first)
        ]
        records.append(write_shard(folder, shard_name("train", first // shard_size), CLASSES, samples))
    label_type: LabelType = "single" if isinstance(labels[0], int) else "multi"
    write_manifest(folder, {"train": records}, DatasetInfo(recipe, label_type, CLASSES), 16)
    return folder


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use threads instead of worker processes, which take half a second to start."""
    monkeypatch.setattr(workers, "_Pool", ThreadPoolExecutor)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two shards of five samples, three classes."""
    return write_small(tmp_path / "small", [0, 1, 2, 0, 1] * 2, 5)


@pytest.fixture
def multi(tmp_path: Path) -> Path:
    """A shard of six multi-label samples, three classes."""
    labels = [MultiLabel.of((Object(i % 3, (i, 0, 3, 4)), Object((i + 1) % 3, (1, 1, 15, 15)))) for i in range(6)]
    return write_small(tmp_path / "multi", labels, 6)


@pytest.fixture(scope="session")
def flowers(tmp_path_factory: pytest.TempPathFactory, image_folder: Make) -> Path:
    """35 JPEGs of three classes."""
    return image_folder(tmp_path_factory.mktemp("source") / "flowers", FLOWERS)


@pytest.fixture(scope="session")
def packed(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flowers in shards of eight, a fifth of every class held out."""
    out = tmp_path_factory.mktemp("packed") / "flowers"
    result = pack(f"imagefolder:{flowers}", out, "--split", "train=0.8,val=0.2", "--shard-size", "8")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"next: fractaltrain pt --shards {out}"
    return out
