"""Real launchers: our own, signalled and bereft of a child, and torchrun on two nodes."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from fractaltrain.run_folder import read_metrics

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@contextmanager
def started(*command: object) -> Iterator[subprocess.Popen[str]]:
    """A module run in the background, with all its processes in a group of their own; none of them survives."""
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=ENVIRONMENT, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def pretraining(dataset: Path, out: Path, epochs: int) -> tuple[object, ...]:
    return (
        "pt", "--shards", dataset, "--out", out, "--model", "test_resnet", "--epochs", epochs, "--batch-size", 8,
        "--image-size", 16,
    )  # fmt: skip


def training_processes(launcher: int) -> list[int]:
    """Children of the launcher that train: neither multiprocessing's resource tracker nor what torch's imports run."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children if "spawn_main" in read_of(child, "cmdline")]


def read_of(process: object, name: str) -> str:
    """What the system tells of a process, nothing if it has ended."""
    try:
        return Path(f"/proc/{process}/{name}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def importing(process: int) -> bool:
    """Whether it has begun to import torch."""
    return "libtorch" in read_of(process, "maps")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL])
def test_launcher_in_mid_run(dataset, tmp_path, number):
    """The launcher is asked to stop, or one of its processes is killed: one line, the right code, all are down."""
    out = tmp_path / "run"
    with started("fractaltrain.cli", *pretraining(dataset, out, 1000), "--nproc", 2) as launcher:
        assert launcher.stdout is not None
        while not (line := launcher.stdout.readline()).startswith("epoch 2/"):
            assert line, launcher.communicate()
        processes = training_processes(launcher.pid)
        assert len(processes) == 2
        os.kill(processes[1] if number == signal.SIGKILL else launcher.pid, number)
        began = time.monotonic()
        rest, err = launcher.communicate(timeout=60)
        assert time.monotonic() - began < 30
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
    if number == signal.SIGKILL:
        assert (launcher.returncode, err.count("\n")) == (1, 1)
        assert err.startswith("error: rank 1 was killed (Signal 9 (SIGKILL)")
    else:
        assert launcher.returncode == 75
        assert err == f"error: stopped by {number.name}; run the same command to continue\n"
        assert rest.splitlines()[-1].startswith(f"{out}: saved at epoch ")


@pytest.mark.slow
def test_processes_end_with_a_killed_launcher(dataset, tmp_path):
    with started("fractaltrain.cli", *pretraining(dataset, tmp_path / "run", 1000), "--nproc", 2) as launcher:
        assert launcher.stdout is not None
        while not (line := launcher.stdout.readline()).startswith("epoch 2/"):
            assert line, launcher.communicate()
        assert "torchvision" not in read_of(launcher.pid, "maps")  # it would wait for that in vain
        ends = [os.pidfd_open(process) for process in training_processes(launcher.pid)]
        launcher.kill()
        assert [select.select([end], [], [], 20)[0] for end in ends] == [[end] for end in ends]
        assert len(ends) == 2
        for end in ends:
            os.close(end)


@pytest.mark.slow
def test_ctrl_c_while_processes_start_is_one_line(dataset, tmp_path):
    """At a terminal all of them get it; they would show what they are importing."""
    with started("fractaltrain.cli", *pretraining(dataset, tmp_path / "run", 1000), "--nproc", 2) as launcher:
        while [importing(process) for process in training_processes(launcher.pid)] != [True, True]:
            assert launcher.poll() is None
        os.killpg(launcher.pid, signal.SIGINT)
        out, err = launcher.communicate(timeout=60)
    assert (launcher.returncode, out) == (130, "")
    assert err.startswith("error: stopped by Ctrl-C, which saves nothing; the same command continues from the last ")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_two_nodes_of_torchrun(dataset, tmp_path):
    """The command of docs/training.md, with both nodes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    torchrun = (
        "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id", "job7",
        "--rdzv-endpoint", endpoint, "--local-addr", "127.0.0.1", "-m", "fractaltrain.cli",
    )  # fmt: skip
    command = (*torchrun, *pretraining(dataset, tmp_path / "run", 2))
    with started(*command) as first, started(*command) as second:
        outputs = [node.communicate(timeout=120) for node in (first, second)]
    assert [first.returncode, second.returncode] == [0, 0], outputs
    assert sorted(out.count("held out: top-1") for out, _ in outputs) == [0, 2]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["environment"]["processes"] == 2
    assert [line["global_step"] for line in read_metrics(tmp_path / "run")] == [6, 6, 12, 12]
