"""Signals in a command's first moments, while it imports: the moments are chosen by modules that send the signal."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ENDINGS = [
    (signal.SIGINT, 130, "error: stopped by Ctrl-C; run the same command to continue\n"),
    (signal.SIGTERM, 75, "error: stopped by SIGTERM; run the same command to continue\n"),
    (signal.SIGUSR1, 75, "error: stopped by SIGUSR1; run the same command to continue\n"),
]


def signalled_while_importing(module: str, number: int, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    (folder / f"{module}.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}", **variables}
    words = [sys.executable, "-m", "fractaltrain", "ft", "--weights", "none", "--data", "digits", "--out", folder / "x"]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)


@pytest.mark.parametrize(("number", "code", "message"), ENDINGS)
@pytest.mark.parametrize("module", ["click", "torch"])
def test_it_ends_at_once_in_one_line(tmp_path, module, number, code, message):
    done = signalled_while_importing(module, number, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", message)
    assert not (tmp_path / "x").exists()


def test_a_launcher_that_ends_its_processes_tells_why_itself(tmp_path):
    done = signalled_while_importing("click", signal.SIGTERM, tmp_path, RANK="0")
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM, "", "")


@pytest.mark.parametrize(
    "module", ["fractaltrain", "fractaltrain.cli", "fractalshards", "fractalgen", "fractalgen.cli"]
)
def test_commands_are_modules_too(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith(module.partition(".")[0])
