"""What tests share: processors only, no deadlines, and where the reference data lies (never copied in here)."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests on every machine; GPUs are measured by tools
settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")


@pytest.fixture(scope="session")
def reference() -> Path:
    """Output of the published renderers; tests that need it are skipped where it is not there."""
    folder = Path(__file__).parents[2] / "shared" / "reference"
    if not folder.is_dir():
        pytest.skip("the reference data does not lie beside the project")
    return folder
