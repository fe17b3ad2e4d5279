"""Small datasets of random images, and packed JPEGs."""

import shlex
from pathlib import Path

import pytest

from fractalshards.sample import MultiLabel, Object
from packing import CLASSES, Make, pack, write_small


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
    return image_folder(tmp_path_factory.mktemp("source") / "flowers", CLASSES)


@pytest.fixture(scope="session")
def packed(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The flowers in shards of eight, a fifth of every class held out."""
    out = tmp_path_factory.mktemp("packed") / "flowers"
    result = pack(f"imagefolder:{flowers}", out, "--split", "train=0.8,val=0.2", "--shard-size", "8")
    assert result.stdout.splitlines()[-1] == f"next: fractaltrain pt --shards {shlex.quote(str(out))}"
    return out
