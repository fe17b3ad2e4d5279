"""The memory of a command is bounded, whatever size a hostile dataset claims or unpacks to."""

import io
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from damages import KEY, SMALL, Damage, in_manifest, npz, with_files, with_image
from fractalshards.manifest import INFO, RECIPE, SYSTEMS
from fractalshards.png import encode_png

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
