"""Fixtures: a small dataset that is built once, and threads in place of worker processes."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from building import SMALL, succeed
from fractalgen import executors


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of ``SMALL``, six shards; tests copy the folder before they change it."""
    out = tmp_path_factory.mktemp("built") / "single"
    succeed(*SMALL, "--workers", 1, "--out", out)
    return out


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use worker threads instead of processes, which take a second to start."""
    monkeypatch.setattr(executors, "worker_pool", ThreadPoolExecutor)
