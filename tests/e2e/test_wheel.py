"""Tests of the wheel in an environment with only its base dependencies: no extras, no torch, no network."""

import json
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from itertools import product
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGES = ("fractalgen", "fractalshards", "fractaltrain")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of a release, with the build tools installed here."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    result = subprocess.run(command, text=True, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def empty(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment with the wheel and, instead of downloads, links to its dependencies; return its programs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=120)
    (libraries,) = folder.glob("lib/python*/site-packages")
    (installed,) = Distribution.discover(name="fractalpretrain", path=[str(libraries)])
    needed: set[tuple[str, str]] = set()
    add_dependencies(installed, "", needed)
    for name in {name for name, _ in needed}:
        link(distribution(name), libraries)
    code = "import importlib.util as u; print([n for n in ('torch', 'timm', 'jinja2', 'pytest') if u.find_spec(n)])"
    assert run(python, folder, "-c", code).stdout == "[]\n", "the environment has extras"
    return folder / "bin"


def add_dependencies(installed: Distribution, extra: str, needed: set[tuple[str, str]]) -> None:
    """Add the name and extra of every direct and indirect dependency of a distribution."""
    for requirement in map(Requirement, installed.requires or ()):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            for found in product([canonicalize_name(requirement.name)], ["", *requirement.extras]):
                if found not in needed:
                    needed.add(found)
                    add_dependencies(distribution(found[0]), found[1], needed)


def link(installed: Distribution, libraries: Path) -> None:
    """Link the packages of a distribution into another folder."""
    for name in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
        target = Path(str(installed.locate_file(name)))
        if not (libraries / name).exists():
            (libraries / name).symlink_to(target)


def run(program: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "NUMBA_CACHE_DIR": str(folder / "cache"), "HOME": str(folder)}
    return subprocess.run(
        [program, *arguments], cwd=folder, env=environment, text=True, capture_output=True, timeout=200
    )


def test_wheel_holds_the_packages_and_their_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    for needed in (*(f"{package}/py.typed" for package in PACKAGES), "fractalshards/templates/report.css"):
        assert needed in names
    assert "fractalgen/data/fractaldb_categories.npz" in names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if "__pycache__" in name or "test" in name]


def test_dataset_is_built_verified_and_pushed(empty: Path, tmp_path: Path) -> None:
    build = "build --kind fractaldb --n 40 --val 8 --classes 5 --size 64 --points 2000 --workers 1"
    built = run(empty / "fractalgen", tmp_path, *build.split())
    assert built.returncode == 0, built.stderr
    assert "next: fractaltrain pt --shards shards/fractaldb" in built.stdout
    info = run(empty / "fractalshards", tmp_path, "info", "--json", "shards/fractaldb")
    assert json.loads(info.stdout)["splits"]["train"] == {"samples": 40, "shards": 1}
    for command in ("verify shards/fractaldb", "sheet shards/fractaldb --out sheet.png", "push shards/fractaldb copy"):
        result = run(empty / "fractalshards", tmp_path, *command.split())
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("program", "arguments", "extra"),
    [
        ("fractaltrain", "ft --weights none --data digits", "train"),
        ("fractalshards", "report shards/single --out page.html", "report"),
        ("fractalgen", "build --kind single --n 9 --classes 3 --executor dask --scheduler tcp://localhost:1", "dask"),
    ],
)
def test_missing_extra_is_named(empty: Path, tmp_path: Path, program: str, arguments: str, extra: str) -> None:
    result = run(empty / program, tmp_path, *arguments.split())
    assert (result.returncode, result.stdout) == (1, "")
    assert f"'.[{extra}]'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("program", PACKAGES)
def test_help_and_version_need_no_extras(empty: Path, tmp_path: Path, program: str) -> None:
    assert "Commands:" in run(empty / program, tmp_path, "--help").stdout
    assert run(empty / program, tmp_path, "--version").returncode == 0
