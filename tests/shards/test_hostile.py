"""Damaged and hostile datasets: ``verify`` names the file at fault in one line, and memory stays bounded."""

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from damages import HOSTILE, KEY, MARK, SMALL, Damage, in_manifest, npz, with_files, with_image
from fractalshards import png
from fractalshards.cli import main
from fractalshards.manifest import INFO, RECIPE, SYSTEMS
from fractalshards.png import encode_png


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


MEMORY = 1500  # megabytes, the bound that shards/README.md states
MEASURE = """
import resource, subprocess, sys
command = [sys.executable, "-c", "from fractalshards.cli import main; main()", *sys.argv[1:]]
result = subprocess.run(command, capture_output=True, text=True)
print(result.stdout, result.stderr, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, sep="\\n")
"""


def run_measured(*arguments: str) -> tuple[str, int]:
    """Return the output of a command, and the peak memory of it or one of its workers in megabytes.

    It runs as a grandchild, because the peak of a child starts at the memory of its parent.
    """
    command = [sys.executable, "-c", MEASURE, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    *output, kilobytes = result.stdout.splitlines()
    return "\n".join(output), int(kilobytes) // 1000


def big_picture() -> bytes:
    """An image of 64 million pixels in the format that takes most memory: WebP, transparent."""
    buffer = io.BytesIO()
    Image.new("RGBA", (8000, 8000)).save(buffer, "WEBP", method=0)
    return buffer.getvalue()


def recipe_of_lists(folder: Path) -> None:
    in_manifest(recipe={"a": "HERE"})(folder)
    lists = "[" + "[]," * 3_900_000 + "[]]"
    (folder / INFO).write_text((folder / INFO).read_text().replace('"HERE"', lists))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "command", "noun", "most"),
    [
        (lambda: recipe_of_lists, "info", "recipe: a", 1000),
        (lambda: recipe_of_lists, "pull", RECIPE, 1000),
        (lambda: npz(bytes(4 * 10**8), zipfile.ZIP_DEFLATED), "verify", SYSTEMS, 200),
        (lambda: npz(bytes(4 * 10**8), zipfile.ZIP_DEFLATED), "push", SYSTEMS, 200),
        (lambda: with_files(txt=bytes(60 << 20)), "verify", KEY, 300),
        (lambda: with_image(big_picture()), "verify", KEY, MEMORY),
        (lambda: with_image(encode_png(np.zeros((4000, 4000, 3), np.uint8))), "report", "page.html: ", 300),
        (lambda: with_image(SMALL + bytes(60 << 20)), "verify", KEY, 400),
    ],
    ids=["recipe", "pull", "systems", "push", "sample", "image", "image in a report", "chunks of an image"],
)
def test_memory_is_bounded(
    dataset: Path, tmp_path: Path, damage: Callable[[], Damage], command: str, noun: str, most: int
) -> None:
    damage()(dataset)
    out = tmp_path / "page.html"
    more = {"report": ["--out", out, "--workers", 1], "push": [out], "pull": [out]}
    output, megabytes = run_measured(command, str(dataset), *map(str, more.get(command, [])))
    assert noun in output
    assert "Traceback" not in output
    assert megabytes < most
