"""Fixture: a small dataset that is built once."""

from pathlib import Path

import pytest

from building import SMALL, succeed


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of ``SMALL``, six shards; tests copy the folder before they change it."""
    out = tmp_path_factory.mktemp("built") / "single"
    succeed(*SMALL, "--workers", 1, "--out", out)
    return out
