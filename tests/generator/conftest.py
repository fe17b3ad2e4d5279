"""A small dataset, built once by one undisturbed worker, the options that it is built with, and threads as workers."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from fractalgen import executors as engines
from fractalgen.cli import main
from recorded_pools import RecordedPools

_OPTIONS = "--kind single --n 110 --val 13 --classes 20 --size 32 --points 3000 --shard-size 25 --workers 1"


@pytest.fixture(scope="session")
def small() -> list[str]:
    """``fractalgen build`` with the options of ``built``, but for ``--out``."""
    return ["build", *_OPTIONS.split()]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, small: list[str]) -> Path:
    """Six shards; tests copy it before they change it."""
    out = tmp_path_factory.mktemp("built") / "single"
    result = CliRunner().invoke(main, [*small, "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> RecordedPools:
    """Threads instead of processes, on a machine of five cores."""
    recorded = RecordedPools()
    monkeypatch.setattr(engines, "worker_pool", recorded)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(5)))
    return recorded
