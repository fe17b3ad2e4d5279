"""Studies whose steps are real processes: signals, failures, and going on."""

import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from fractalshards.errors import StoppedError
from fractaltrain.study import step_processes


def test_a_signal_goes_to_all_steps(tmp_path, fractaltrain, dataset):
    """Two that train, and a third one that must not start any more."""

    def arguments(name):
        common = ("--model", "test_resnet", "--image-size", "16", "--batch-size", "10", "--epochs", "10000")
        return ("pt", "--shards", str(dataset), *common, "--out", str(tmp_path / name))

    before = signal.getsignal(signal.SIGTERM)
    expected = pytest.raises(StoppedError, match="stopped by SIGTERM; run the same command")
    logs = []
    with ExitStack() as stack:
        with step_processes(threads=1) as processes, expected as caught:
            for name in ("a", "b"):
                os.mkfifo(tmp_path / f"{name}.txt")  # to wait for what it says
                processes.start(name, arguments(name), tmp_path / f"{name}.txt")
                logs.append(stack.enter_context(open(tmp_path / f"{name}.txt")))
                assert any(line.startswith("epoch 1/") for line in logs[-1])
            signal.raise_signal(signal.SIGTERM)
            processes.start("c", arguments("c"))
        assert all("saved at epoch" in log.read() for log in logs)
    assert caught.value.code == 75
    assert signal.getsignal(signal.SIGTERM) == before
    for name in ("a", "b"):
        assert list((tmp_path / name).glob("checkpoint-*.pt"))
    assert not (tmp_path / "c").exists()


def test_ctrl_c_is_told_once(tmp_path, dataset, capfd):
    """At a terminal it comes to the steps and to the study."""
    common = ("--model", "test_resnet", "--image-size", "16", "--batch-size", "10", "--epochs", "10000")
    arguments = ("pt", "--shards", str(dataset), *common, "--out", str(tmp_path / "a"))
    os.mkfifo(tmp_path / "log")

    def interrupted() -> None:
        with step_processes(threads=1) as processes:
            processes.start("a", arguments, tmp_path / "log")
            with open(tmp_path / "log") as log:
                assert any(line.startswith("epoch 1/") for line in log)
                [step] = multiprocessing.active_children()
                os.kill(step.pid, signal.SIGINT)
                processes.wait()

    with pytest.raises(StoppedError, match="stopped by Ctrl-C, which saves nothing") as caught:
        interrupted()
    assert (caught.value.code, capfd.readouterr().err) == (130, "")


def test_a_step_that_fails_leaves_the_others_alone(tmp_path):
    with step_processes(threads=1) as processes:
        processes.start("good", ["--version"], tmp_path / "good.txt")
        processes.start("bad", ["ft", "--weights", str(tmp_path / "none"), "--data", "digits"])
        ended = dict(processes.wait() for _ in range(2))
    assert ended == {"good": 0, "bad": 1}
    assert "fractaltrain" in (tmp_path / "good.txt").read_text()


def test_a_study_that_is_stopped_goes_on(fractaltrain, tmp_path, dataset, monkeypatch):
    """A real one: a pre-training and a fine-tuning, one epoch each."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # steps this small lose much to more threads on busy cores
    (tmp_path / "s.toml").write_text(f"""
[study]
image_size = 16
pretraining = {{ epochs = 1, batch_size = 10 }}
finetuning = {{ epochs = 1, batch_size = 250 }}
[models.test_resnet]
[pretraining.small]
shards = "{dataset}"
[finetuning.digits]
per_class = [25]
""")
    out = tmp_path / "out"
    arguments = ("study", str(tmp_path / "s.toml"), "--out", str(out))
    command = [sys.executable, "-u", "-m", "fractaltrain.cli", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.startswith("$ fractaltrain pt ") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert (process.returncode, err.splitlines()[-1:]) == (
        75, ["error: stopped by SIGTERM; run the same command to continue"],
    )  # fmt: skip
    assert not list(out.rglob("result.json"))
    done = fractaltrain(*arguments)
    assert (done.code, done.err) == (0, f"{out}: table.csv, table.md, figure.png\n")
    assert "| digits, 25 per class | test_resnet |" in done.out
    assert {path.name for path in out.iterdir()} == {"pt", "ft", "study.json", "table.csv", "table.md", "figure.png"}
    again = fractaltrain(*arguments)
    assert again.code == 0
    assert "$ fractaltrain" not in again.out
    assert again.err == f"{out}: done already: 2 of 2 steps\n{out}: table.csv, table.md, figure.png\n"
