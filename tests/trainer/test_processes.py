"""Real runs of one, two and four processes with gloo: what they train on, that they continue, and how they fail."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fractalshards.manifest import load_manifest, read_record
from fractaltrain.checkpoint import load_checkpoint
from fractaltrain.data.shards import ShardSource
from fractaltrain.evaluation import evaluate
from fractaltrain.inputs import evaluation_geometry
from fractaltrain.models import create_model
from fractaltrain.recipes import PRETRAINING
from fractaltrain.run_folder import read_metrics
from fractaltrain.stream.loader import Batches, Loading, iterate
from fractaltrain.stream.order import epoch_order, training_positions
from fractaltrain.world import World

SCRIPT = Path(__file__).with_name("recorded_run.py")
EPOCHS, BATCH, STEPS = 2, 4, 12  # of 50 samples
ALONE = World(rank=0, size=1, local_size=1, device=torch.device("cpu"))


def run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)


def pretraining(dataset: Path, out: Path) -> tuple[object, ...]:
    return (
        "pt", "--shards", dataset, "--out", out, "--model", "resnet10t", "--epochs", EPOCHS, "--batch-size", BATCH,
        "--window", 2, "--save-every-minutes", 0,
    )  # fmt: skip


def recorded(folder: Path, death: str, *arguments: object, world: int = 2) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", world)
    return run(*torchrun, SCRIPT, folder, death, *arguments)


def keys(folder: Path, rank: int) -> list[tuple[int, list[int]]]:
    """(step, sample indices) of each batch that a rank saw."""
    lines = (folder / f"keys-{rank}.jsonl").read_text().splitlines()
    return [(step, [int(key) for key in batch]) for step, *batch in map(json.loads, lines)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved = load_checkpoint(folder)
    assert saved is not None
    return saved.state["model"]


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes with one loader worker each; its keys lie in ``keys`` beside it."""
    folder = tmp_path_factory.mktemp("two") / "run"
    done = recorded(folder.with_name("keys"), "never", *pretraining(dataset, folder), "--workers", 1)
    assert done.returncode == 0, done.stderr
    return folder


def test_ranks_train_on_exactly_the_epoch_that_the_order_says(undisturbed):
    for rank in range(2):
        expected = []
        for epoch in range(EPOCHS):
            order = epoch_order([20, 13, 17], seed=0, epoch=epoch, window=2)
            batches = order[training_positions(50, BATCH, rank, 2, pad=False)]
            held_out = 50 + np.arange(rank, 13, 2)
            expected += [(step, batch.tolist()) for step, batch in enumerate(batches)]
            expected += [(step, held_out[2 * step : 2 * step + 2].tolist()) for step in range(4 - rank)]
        assert keys(undisturbed.with_name("keys"), rank) == expected


def trained_on(folder: Path, world: int) -> list[tuple[int, list[int]]]:
    """(step, sample indices of all ranks in order) of each global batch that was trained on, not of evaluations.

    When rank 0 is killed, others may have fetched one batch more.
    """
    ranks = [[line for line in keys(folder, rank) if max(line[1]) < 50] for rank in range(world)]
    assert {len(rank) - len(ranks[0]) for rank in ranks} <= {0, 1}
    together = zip(*ranks, strict=False)
    assert all(len({step for step, _ in parts}) == 1 for parts in zip(*ranks, strict=False))
    return [(parts[0][0], [index for _, part in parts for index in part]) for parts in together]


def test_four_processes_stopped_in_mid_epoch_and_continued_by_one(dataset, tmp_path):
    """Killed after step 10 of the second epoch of three; one with a loader worker trains on what is left, exactly."""
    arguments = (*pretraining(dataset, tmp_path / "run"), "--epochs", 3, "--model", "deit_tiny_patch16_224")
    killed = recorded(tmp_path / "before", "1:10", *arguments, world=4)
    assert killed.returncode == 1
    done = recorded(tmp_path / "after", "never", *arguments, "--workers", 1, world=1)
    assert done.returncode == 0, done.stderr
    expected = []
    for epoch in range(3):
        order = epoch_order([20, 13, 17], seed=0, epoch=epoch, window=2)
        expected += list(enumerate(order[: STEPS * BATCH].reshape(STEPS, BATCH).tolist()))
    assert trained_on(tmp_path / "before", 4) == expected[: STEPS + 10]
    assert trained_on(tmp_path / "after", 1) == expected[STEPS + 10 :]


def test_evaluation_by_two_processes_is_that_by_one(undisturbed, dataset):
    model = create_model("resnet10t", 5, 32)
    model.load_state_dict(weights(undisturbed))
    source = ShardSource(load_manifest(dataset), "val")
    batches = Batches(
        source, evaluation_geometry(PRETRAINING["anderson"], 32), np.arange(13)[None], np.arange(13), seed=0, epoch=0
    )
    loaded = iterate(batches, 0, Loading(workers=0, pin_memory=False))
    scores = evaluate(model, loaded, PRETRAINING["anderson"], torch.float32, False, ALONE)
    result = json.loads((undisturbed / "result.json").read_text())
    assert (result["samples"], result["top1"], result["top5"]) == (13, scores.top1, scores.top5)
    assert result["loss"] == pytest.approx(scores.loss, rel=1e-4)


def test_killed_in_mid_epoch_and_continued_bit_for_bit(undisturbed, dataset, tmp_path):
    """Killed under torchrun with a loader worker, continued by the command itself without one."""
    out = tmp_path / "run"
    killed = recorded(tmp_path / "keys", "1:10", *pretraining(dataset, out), "--workers", 1)
    assert killed.returncode == 1
    assert not (out / "result.json").exists()
    done = run("fractaltrain.cli", *pretraining(dataset, out), "--nproc", 2)
    assert (done.returncode, done.stderr) == (0, "")
    assert "continuing at epoch 2, step 10" in done.stdout
    expected = weights(undisturbed)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(out).items())
    curves = [[(line["global_step"], line.get("loss")) for line in read_metrics(run)] for run in (out, undisturbed)]
    assert curves[0] == curves[1]
    assert (out / "result.json").read_text() == (undisturbed / "result.json").read_text()


def test_damaged_sample_brings_all_down_with_one_line(dataset, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(dataset, folder)
    start = read_record(folder, "train-000000.tar", "single").offsets[3]
    with (folder / "train-000000.tar").open("r+b") as file:
        file.seek(start + 512 + 60)
        file.write(b"garbage" * 20)
    began = time.monotonic()
    done = run("fractaltrain.cli", *pretraining(folder, tmp_path / "run"), "--nproc", 2)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {folder}/train-000000.tar: 000000003: image cannot be decoded")
    assert done.stderr.count("\n") == 1
    assert time.monotonic() - began < 60


def test_bad_samples_are_replaced_and_counted_and_ranks_stay_in_step(dataset, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(dataset, folder)
    bad = {"train-000000.tar": (3, 9), "train-000002.tar": (0,), "val-000000.tar": (5,)}
    for shard, places in bad.items():
        offsets = read_record(folder, shard, "single").offsets
        with (folder / shard).open("r+b") as file:
            for place in places:
                file.seek(offsets[place] + 512 + 60)
                file.write(b"garbage" * 20)
    arguments = (*pretraining(folder, tmp_path / "run"), "--on-bad-sample", "skip")
    done = recorded(tmp_path / "keys", "never", *arguments)
    assert done.returncode == 0, done.stderr
    expected, replaced = [], []
    for epoch in range(EPOCHS):
        order = epoch_order([20, 13, 17], seed=0, epoch=epoch, window=2).tolist()
        good = [index not in (3, 9, 33) for index in order]
        following = [next(p for p in range(at, at + 50) if good[p % 50]) % 50 for at in range(STEPS * BATCH)]
        batches = np.array(order)[following].reshape(STEPS, BATCH).tolist()
        expected += list(enumerate(batches))
        replaced.append(good[: STEPS * BATCH].count(False))
    assert trained_on(tmp_path / "keys", 2) == expected
    said = [
        f"epoch {epoch}/{EPOCHS}  {count} bad samples, replaced by others" for epoch, count in enumerate(replaced, 1)
    ]
    assert [line for line in said if line in done.stdout] == said
    assert "bad sample, going on without it: " in done.stderr
    assert "000000003: image cannot be decoded" in done.stderr
    epochs = [line for line in read_metrics(tmp_path / "run") if line["split"] == "epoch"]
    assert [line["bad_samples"] for line in epochs] == replaced
    assert json.loads((tmp_path / "run" / "result.json").read_text())["samples"] == 12


def test_batch_that_processes_cannot_share(dataset, tmp_path):
    done = run("fractaltrain.cli", *pretraining(dataset, tmp_path / "run"), "--batch-size", 5, "--nproc", 2)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "error: 2 processes cannot share a batch of 5 equally; choose --batch-size 4 or another --nproc\n"
    )
