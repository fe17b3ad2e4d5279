"""A small dataset of random images, made with the writer alone."""

from pathlib import Path

import numpy as np
import pytest

from fractalshards.digest import mapping_digest, systems_digest
from fractalshards.manifest import RECIPE, SYSTEMS, sample_key, shard_name, write_manifest
from fractalshards.storage import write_json
from fractalshards.systems import write_systems
from fractalshards.writer import write_shard
from packed_flowers import CLASSES as FLOWERS
from packed_flowers import Make, pack

CLASSES = 3


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Two shards of five samples, three classes, 16 x 16 pixels."""
    folder = tmp_path / "small"
    folder.mkdir()
    rng = np.random.default_rng(0)
    systems = [rng.random((2, 2, 3)) for _ in range(CLASSES)]
    recipe = {"kind": "random", "n": 10, "systems_digest": systems_digest(systems)}
    write_systems(folder / SYSTEMS, systems)
    write_json(folder / RECIPE, {"recipe": recipe, "recipe_digest": mapping_digest(recipe)})
    records = []
    for shard in range(2):
        samples = [
            (sample_key(5 * shard + i), (rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), i % CLASSES))
            for i in range(5)
        ]
        records.append(write_shard(folder, shard_name("train", shard), CLASSES, samples))
    write_manifest(
        folder,
        {"train": records},
        recipe=recipe,
        recipe_digest=mapping_digest(recipe),
        label_type="single",
        classes=CLASSES,
        image_size=16,
    )
    return folder


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
