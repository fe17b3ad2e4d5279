"""Damaged and hostile datasets: ``verify`` names the file at fault in one line, and nothing else happens."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from damages import HOSTILE, MARK
from fractalshards import png
from fractalshards.cli import main
from fractalshards.manifest import INFO


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", HOSTILE)
def test_verify_names_the_file_at_fault(
    name: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(png, "_MAX_CHUNKS", 1000)
    damage, noun = HOSTILE[name]
    damage(dataset)
    before = {path.name for folder in (dataset, tmp_path) for path in folder.iterdir()}
    result = CliRunner().invoke(main, ["verify", str(dataset), "--workers", "1", "--quiet"])
    assert isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code == 1, result.output
    (error,) = result.stderr.splitlines()
    assert error.startswith(f"error: {dataset}")
    bad = result.stdout.splitlines()
    assert all(line.startswith(f"bad: {dataset}/") and line.count(str(dataset)) == 1 for line in bad)
    assert any(noun in line for line in bad or [error])
    assert all(len(line) < 2100 and line.isprintable() for line in [error, *bad])
    assert {path.name for folder in (dataset, tmp_path) for path in folder.iterdir()} == before
    assert not MARK.exists()


def test_info_prints_no_escapes(dataset: Path) -> None:
    info = json.loads((dataset / INFO).read_text())
    (dataset / INFO).write_text(json.dumps({**info, "recipe": {"[/red]": "\x1b[31m", "params": 5}}))
    result = CliRunner().invoke(main, ["info", str(dataset)])
    assert result.exit_code == 0, result.output
    assert "[/red]" in result.stdout
    assert "\x1b" not in result.stdout
