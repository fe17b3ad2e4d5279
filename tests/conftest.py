"""What tests share: the folder of reference data, which lies beside the project and is never copied into it."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reference() -> Path:
    """Output of the published renderers; tests that need it are skipped where it is not there."""
    folder = Path(__file__).parents[2] / "shared" / "reference"
    if not folder.is_dir():
        pytest.skip("the reference data does not lie beside the project")
    return folder
