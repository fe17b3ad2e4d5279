"""A small dataset that is built once, and threads in place of worker processes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from fractalgen import executors
from fractalgen.cli import main

_OPTIONS = "--kind single --n 110 --val 13 --classes 20 --size 32 --points 3000 --shard-size 25"


@pytest.fixture(scope="session")
def small() -> list[str]:
    """``fractalgen build`` with the options of ``built``, except for ``--out``."""
    return ["build", *_OPTIONS.split()]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Path:
    """Six shards, built by one process; tests copy the folder before they change it."""
    out = tmp_path_factory.mktemp("built") / "single"
    result = CliRunner().invoke(main, [*small, "--workers", "1", "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker threads instead of processes, which take a second to start."""
    monkeypatch.setattr(executors, "worker_pool", ThreadPoolExecutor)
