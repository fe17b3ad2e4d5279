"""What is kept of a run and what is made of it: damaged, foreign or whole, after a signal or on a full disk."""

import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fractalshards.errors import FractalError, StoppedError
from fractaltrain import train as module
from fractaltrain.checkpoint import list_checkpoints, load_checkpoint
from fractaltrain.train import train
from tiny_job import ALONE, RECIPE, during_step, job, lines, stop_before, weights

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_checkpoints_inside_an_epoch_are_used(tmp_path, monkeypatch, capfd):
    saves = []

    def save_and_stop(folder: Path, position, state, keep) -> None:
        save(folder, position, state, keep)
        saves.append((position.epoch, position.step))
        if saves[-1] == (1, 20):
            raise KeyboardInterrupt

    save = module.save_checkpoint
    monkeypatch.setattr(module, "save_checkpoint", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train(job(tmp_path / "run"), ALONE)
    assert saves == [(0, 10), (0, 20), (1, 0), (1, 10), (1, 20)]
    monkeypatch.undo()
    capfd.readouterr()
    train(job(tmp_path / "run"), ALONE)
    assert "run: continuing at epoch 2, step 20\n" in capfd.readouterr().out


def test_long_intervals_save_after_epochs_only(tmp_path, monkeypatch):
    saves = []
    monkeypatch.setattr(module, "save_checkpoint", lambda folder, position, *_: saves.append(position.step))
    train(job(tmp_path / "run", save_every_minutes=10.0), ALONE)
    assert saves == [0, 0]


def test_finished_run_is_not_trained_again(tiny_run, monkeypatch, capfd):
    monkeypatch.setattr(module, "epoch_order", None)  # would fail if an epoch began
    before = lines(tiny_run)
    train(job(tiny_run), ALONE)
    assert lines(tiny_run) == before
    assert f"{tiny_run}: 2 epochs done" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": replace(RECIPE, lr=0.5)}, r"holds a run with recipe\.lr 0\.015, not 0\.5; choose another folder"),
        ({"seed": 1}, "holds a run with seed 0, not 1"),
        ({"pad": True, "seed": 1}, "holds a run with seed 0, not 1, and 1 other difference;"),
    ],
)
def test_folder_of_another_run_is_refused(tiny_run, changes, message):
    before = [(path, path.stat().st_mtime_ns) for path in list_checkpoints(tiny_run)]
    with pytest.raises(FractalError, match=message):
        train(job(tiny_run, **changes), ALONE)
    assert [(path, path.stat().st_mtime_ns) for path in list_checkpoints(tiny_run)] == before


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "garbage": b"x" * 100}[how])


@pytest.mark.parametrize("how", ["cut", "empty", "garbage"])
def test_damaged_checkpoint_gives_way_to_the_one_before(tiny_run, tmp_path, monkeypatch, capfd, how):
    """Even with --keep 1 from then on, and the curve stays the same."""
    folder = tmp_path / "run"
    stop_before(monkeypatch, 1, 21)
    with pytest.raises(KeyboardInterrupt):
        train(job(folder), ALONE)
    monkeypatch.undo()
    assert [path.name[11:-3] for path in list_checkpoints(folder)] == ["0001-0000000", "0001-0000010", "0001-0000020"]
    damage(list_checkpoints(folder)[-1], how)
    capfd.readouterr()
    train(job(folder, keep=1), ALONE)
    out = capfd.readouterr().out.splitlines()
    assert out[0].startswith(f"{folder}/checkpoint-0001-0000020.pt: damaged (")
    assert out[0].endswith("); taking the one before")
    assert out[1] == f"{folder}: continuing at epoch 2, step 10"
    assert lines(folder) == lines(tiny_run)
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-0002-0000000.pt"]


def test_nothing_but_damaged_checkpoints_is_one_line(tmp_path):
    folder = tmp_path / "run"
    train(job(folder, replace(RECIPE, epochs=1)), ALONE)
    for path in list_checkpoints(folder):
        damage(path, "cut")
    expected = rf"checkpoint-0001-0000000\.pt: damaged \(.*\), and so are 2 older ones; remove {folder} to start again"
    with pytest.raises(FractalError, match=expected) as error:
        train(job(folder, replace(RECIPE, epochs=1)), ALONE)
    assert "\n" not in str(error.value)


def test_foreign_checkpoint_is_one_line(tiny_run, tmp_path):
    """One of another model, and one that this software did not write."""
    folder = tmp_path / "run"
    train(job(folder, replace(RECIPE, epochs=1), keep=1), ALONE)
    (path,) = list_checkpoints(folder)
    state = torch.load(path, weights_only=True)
    for content, expected in (
        ({**state, "model": nn.Linear(3, 2).state_dict()}, r"of another run or model \(.*\); remove it, or choose"),
        ({**state, "format": 1}, "written by another version; choose another folder"),
        (state["model"], r"damaged \(no 'format'\); remove"),
    ):
        torch.save(content, path)
        with pytest.raises(FractalError, match=expected) as error:
            train(job(folder, replace(RECIPE, epochs=1)), ALONE)
        assert "\n" not in str(error.value)


def test_no_more_checkpoints_than_asked_for(tmp_path):
    train(job(tmp_path / "run", keep=2), ALONE)
    names = [path.name for path in list_checkpoints(tmp_path / "run")]
    assert names == ["checkpoint-0001-0000020.pt", "checkpoint-0002-0000000.pt"]


def test_resume_never_and_must(tmp_path):
    with pytest.raises(FractalError, match=r"run: no run to continue; check --out, or drop --resume must"):
        train(job(tmp_path / "run", resume="must"), ALONE)
    assert not (tmp_path / "run").exists()
    train(job(tmp_path / "run", replace(RECIPE, epochs=1), resume="never"), ALONE)
    with pytest.raises(FractalError, match=r"run: holds a run already; choose another folder with --out"):
        train(job(tmp_path / "run", replace(RECIPE, epochs=1), resume="never"), ALONE)
    train(job(tmp_path / "run", replace(RECIPE, epochs=1), resume="must"), ALONE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("step", [1, 7, 20, 25])
def test_signal_saves_after_the_step_and_the_curve_is_the_same(tiny_run, tmp_path, monkeypatch, capfd, step, number):
    folder = tmp_path / "run"
    before = signal.getsignal(number)
    during_step(monkeypatch, 1, step, lambda: signal.raise_signal(number))
    with pytest.raises(StoppedError, match=f"stopped by {number.name}; run the same command to continue") as error:
        train(job(folder), ALONE)
    assert error.value.code == 75
    assert signal.getsignal(number) == before
    newest = list_checkpoints(folder)[-1].name
    assert capfd.readouterr().out.splitlines()[-1] == f"{folder}: saved at epoch 2, step {step}, as {newest}"
    monkeypatch.undo()
    train(job(folder, resume="must"), ALONE)
    assert lines(folder) == lines(tiny_run)
    expected = weights(tiny_run)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(folder).items())


def test_signal_during_the_evaluation(tiny_run, tmp_path, monkeypatch):
    """It is given up, and done again by the same command."""
    folder = tmp_path / "run"
    seen: list[int] = []

    def signalled(batches, *arguments):
        if len(batches) == 1:  # of the held-out images
            seen.append(1)
            if len(seen) == 2:
                signal.raise_signal(signal.SIGUSR1)
        return iterate(batches, *arguments)

    iterate = module.iterate
    monkeypatch.setattr(module, "iterate", signalled)
    with pytest.raises(StoppedError):
        train(job(folder), ALONE)
    assert list_checkpoints(folder)[-1].name == "checkpoint-0001-0000025.pt"
    monkeypatch.undo()
    train(job(folder), ALONE)
    assert lines(folder) == lines(tiny_run)


def test_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, fractaltrain, dataset):
    """A limit on the size of files stands in for a full disk: the write fails in the same place."""
    arguments = ("pt", "--shards", dataset, "--model", "test_resnet", "--batch-size", 25, "--out", tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        outcome = fractaltrain(*arguments, "--epochs", 1, "--image-size", 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert outcome.code == 1
    assert outcome.err == f"error: {tmp_path / 'run' / 'checkpoint-0001-0000000.pt'}: File too large\n"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"run.json", "metrics.jsonl", "tb"}
    assert fractaltrain(*arguments, "--epochs", 1, "--image-size", 16).code == 0


def test_checkpoint_cannot_run_code(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path(tmp_path / "pwned").touch, ())

    torch.save({"format": 2, "position": Malicious()}, tmp_path / "checkpoint-0001-0000000.pt")
    with pytest.raises(FractalError, match="damaged"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "pwned").exists()
