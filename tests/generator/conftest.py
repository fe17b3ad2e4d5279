"""Fixtures: a small dataset that is built once, and threads in place of worker processes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from building import SMALL, run
from fractalgen import executors


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of ``SMALL``, six shards; tests copy the folder before they change it."""
    out = tmp_path_factory.mktemp("built") / "single"
    result = run(*SMALL, "--workers", 1, "--out", out)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use worker threads instead of processes, which take a second to start."""
    monkeypatch.setattr(executors, "worker_pool", ThreadPoolExecutor)
