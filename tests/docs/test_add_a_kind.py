"""The worked example of docs/add-a-kind.md: one file, a registry changed as shown, a build."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fractalshards.manifest import load_manifest
from fractalshards.verify import verify_dataset

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "add-a-kind.md"
EXAMPLE = ROOT / "docs" / "examples" / "glow.py"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the generator, changed as the page says."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "generator", folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    shutil.copy(EXAMPLE, folder / "fractalgen" / "kinds")
    registry = folder / "fractalgen" / "kinds" / "__init__.py"
    text = registry.read_text()
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE.read_text(), re.DOTALL)
    changes = re.findall(r"^-(.*)\n\+(.*)$", diff, re.MULTILINE)
    assert changes
    for before, after in changes:
        assert f"{before}\n" in text, f"not a line of the registry: {before}"
        text = text.replace(f"{before}\n", f"{after}\n")
    registry.write_text(text)
    return folder


def fractalgen(package: Path, command: str) -> str:
    python = [sys.executable, "-c", "from fractalgen.cli import main; main()", *command.split()]
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "NUMBA_CACHE_DIR": str(package / "cache")}
    result = subprocess.run(python, text=True, capture_output=True, cwd=package, env=environment, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_new_kind_is_listed_drawn_and_built(package: Path) -> None:
    assert "share of the extent that the window" in fractalgen(package, "kinds")
    fractalgen(package, "preview --kind glow --classes 2 --per-class 2 --size 64 --out sheet.png")
    assert (package / "sheet.png").stat().st_size > 1000
    build = "build --kind glow --n 40 --val 10 --classes 5 --size 64 --points 5000 --shard-size 20 --set zoom=1"
    assert "next: fractaltrain pt --shards built" in fractalgen(package, f"{build} --workers 1 --out built")
    manifest = load_manifest(package / "built")
    assert (manifest.recipe["kind"], manifest.recipe["params"]["zoom"]) == ("glow", [1.0, 1.0])
    assert not verify_dataset(manifest, 1)
    with pytest.raises(AssertionError, match=r"error: zoom is 0.5,2.0"):
        fractalgen(package, "build --kind glow --n 40 --classes 5 --set zoom=0.5,2 --out refused")
