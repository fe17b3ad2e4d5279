"""The commands in scripts: both streams, ``--quiet``, ``--json``, whole lines."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
BUILD = "fractalgen build --kind single --n 60 --val 20 --classes 5 --size 32 --shard-size 25 --workers 1"


def run(command: str, folder: Path, code: int = 0) -> tuple[str, str]:
    program, *arguments = command.split()
    result = subprocess.run([BIN / program, *arguments], cwd=folder, text=True, capture_output=True, timeout=280)
    assert result.returncode == code, result.stderr
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``shards/single``, as the README makes it, and a copy in ``damaged`` of which one byte differs."""
    folder = tmp_path_factory.mktemp("workspace")
    out, err = run(BUILD, folder)
    assert "next: fractaltrain pt --shards shards/single" in out
    assert "rendering: 80 / 80 images" in err
    assert "rendering" not in out
    assert not {"\r", "\x1b"} & set(out + err)  # of a log, whole lines
    run("fractalshards push shards/single damaged --quiet", folder)
    shard = folder / "damaged" / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[3000] ^= 1
    shard.write_bytes(data)
    return folder


def on_a_terminal(command: Sequence[str | Path], folder: Path) -> str:
    """Return what a command writes to stderr when that is a terminal."""
    reader, writer = pty.openpty()
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=writer, check=True, timeout=100)
    os.close(writer)
    shown = b""
    try:
        while chunk := os.read(reader, 65536):
            shown += chunk
    except OSError:  # the end of a terminal on Linux
        pass
    os.close(reader)
    return shown.decode()


def test_progress_bar_on_a_terminal(folder: Path) -> None:
    command = [BIN / "fractalshards", "verify", "shards/single", "--workers", "1"]
    assert "\x1b[" in (shown := on_a_terminal(command, folder))
    assert "80 / 80 images" in shown
    assert on_a_terminal([*command, "--quiet"], folder) == ""


def test_json_of_info(folder: Path) -> None:
    facts = json.loads(run("fractalshards info --json shards/single", folder)[0])
    assert facts["splits"] == {"train": {"samples": 60, "shards": 3}, "val": {"samples": 20, "shards": 1}}
    assert (facts["recipe"]["kind"], facts["classes"], len(facts["content_digest"])) == ("single", 5, 32)


def test_json_of_verify(folder: Path) -> None:
    assert json.loads(run("fractalshards verify --json shards/single", folder)[0]) == {"sound": True, "problems": []}
    out, err = run("fractalshards verify --json --quiet damaged", folder, code=1)
    found = json.loads(out)
    assert not found["sound"]
    assert {problem["file"] for problem in found["problems"]} == {"train-000001.tar"}
    assert err.startswith("error: damaged: ")
    assert len(err.splitlines()) == 1


def test_json_of_diff(folder: Path) -> None:
    assert json.loads(run("fractalshards diff --json --quiet shards/single damaged", folder)[0])["same"]
    out, err = run(f"{BUILD} --quiet --seed 1 --out other", folder)
    assert out.startswith("other: 60 train, 20 val images in ")
    assert (out.count("\n"), err) == (1, "")  # no advice on what comes next
    found = json.loads(run("fractalshards diff --json --quiet shards/single other", folder, code=1)[0])
    assert not found["same"]
    assert found["findings"]
