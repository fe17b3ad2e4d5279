"""Real runs of one, two and four processes with gloo: what they train on, that they continue, and how they fail."""

import json
import os
import shutil
import signal
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
from fractaltrain.distributed import World
from fractaltrain.evaluate import evaluate
from fractaltrain.models import create_model
from fractaltrain.recipes import PT_RECIPES
from fractaltrain.run_folder import read_metrics
from fractaltrain.stream.loader import Batches, Loading, iterate
from fractaltrain.stream.order import epoch_order, training_positions
from fractaltrain.transforms import evaluation_geometry

EPOCHS, BATCH, STEPS = 2, 4, 12  # of 50 samples
SMALL = ("--model", "test_vit")  # without batch norm, which cannot have a sample per rank
ALONE = World(rank=0, size=1, local_size=1, device=torch.device("cpu"))


def run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)


def pretraining(dataset: Path, out: Path) -> tuple[object, ...]:
    return (
        "pt", "--shards", dataset, "--out", out, "--model", "test_resnet", "--epochs", EPOCHS, "--batch-size", BATCH,
        "--window", 2, "--save-every-minutes", 0,
    )  # fmt: skip


def keys(folder: Path, rank: int) -> list[tuple[int, list[int]]]:
    """(step, sample indices) of each batch that a rank saw."""
    lines = (folder / f"keys-{rank}.jsonl").read_text().splitlines()
    return [(step, [int(key) for key in batch]) for step, *batch in map(json.loads, lines)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved = load_checkpoint(folder)
    assert saved is not None
    return saved.state["model"]


def epochs_of(order_of: list[int]) -> list[tuple[int, list[int]]]:
    """(step, sample indices) of each global batch of an epoch of this order."""
    return list(enumerate(np.array(order_of[: STEPS * BATCH]).reshape(STEPS, BATCH).tolist()))


def order(epoch: int) -> list[int]:
    return epoch_order([20, 13, 17], seed=0, epoch=epoch, window=2).tolist()


def trained_on(folder: Path, world: int) -> list[tuple[int, list[int]]]:
    """(step, sample indices of all ranks in order) of each global batch that was trained on, not of evaluations.

    When rank 0 is killed, others may have fetched one batch more.
    """
    ranks = [[line for line in keys(folder, rank) if max(line[1]) < 50] for rank in range(world)]
    assert {len(rank) - len(ranks[0]) for rank in ranks} <= {0, 1}
    together = list(zip(*ranks, strict=False))
    assert all(len({step for step, _ in parts}) == 1 for parts in together)
    return [(parts[0][0], [index for _, part in parts for index in part]) for parts in together]


@pytest.fixture(scope="module")
def undisturbed(world, dataset, tmp_path_factory) -> tuple[Path, Path]:
    """A run of two processes with one loader worker each, and the folder with the keys of its batches."""
    folder = tmp_path_factory.mktemp("two") / "run"
    ended = world(2, *pretraining(dataset, folder), "--workers", 1, record=True)
    assert (ended.codes, ended.said()) == ([0, 0], "")
    return folder, ended.folder


def test_ranks_train_on_exactly_the_epoch_that_the_order_says(undisturbed):
    """Batch by batch and rank by rank, evaluations too."""
    for rank in range(2):
        expected = []
        for epoch in range(EPOCHS):
            batches = np.array(order(epoch))[training_positions(50, BATCH, rank, 2, pad=False)]
            held_out = 50 + np.arange(rank, 13, 2)
            expected += [(step, batch.tolist()) for step, batch in enumerate(batches)]
            expected.append((0, held_out.tolist()))
        assert keys(undisturbed[1], rank) == expected


@pytest.mark.parametrize(("size", "workers"), [(1, 0), (1, 2), (2, None), (4, 0)])
def test_any_number_of_processes_trains_on_the_same_epochs(world, undisturbed, dataset, tmp_path, size, workers):
    if workers is None:
        folder = undisturbed[1]
    else:
        arguments = (*pretraining(dataset, tmp_path / "run"), *SMALL, "--save-every-minutes", 10, "--workers", workers)
        ended = world(size, *arguments, record=True)
        assert ended.codes == [0] * size, ended.said()
        folder = ended.folder
    assert trained_on(folder, size) == [batch for epoch in range(EPOCHS) for batch in epochs_of(order(epoch))]


def test_four_processes_stopped_in_mid_epoch_and_continued_by_one(world, dataset, tmp_path):
    """Killed after step 10 of the second epoch of three; one with a loader worker trains on what is left, exactly."""
    arguments = (*pretraining(dataset, tmp_path / "run"), *SMALL, "--epochs", 3)
    killed = world(4, *arguments, record=True, signals=[[0, 1, 11, signal.SIGKILL]])
    assert killed.codes[0] == -signal.SIGKILL
    done = world(1, *arguments, "--workers", 1, record=True)
    assert (done.codes, done.said()) == ([0], "")
    expected = [batch for epoch in range(3) for batch in epochs_of(order(epoch))]
    assert trained_on(killed.folder, 4) == expected[: STEPS + 10]
    assert trained_on(done.folder, 1) == expected[STEPS + 10 :]


def test_evaluation_by_two_processes_is_that_by_one(undisturbed, dataset):
    folder, _ = undisturbed
    model = create_model("test_resnet", 5, 32)
    model.load_state_dict(weights(folder))
    source = ShardSource(load_manifest(dataset), "val")
    batches = Batches(
        source, evaluation_geometry(PT_RECIPES["anderson"], 32), np.arange(13)[None], np.arange(13), seed=0, epoch=0
    )
    loaded = iterate(batches, 0, Loading(workers=0, pin_memory=False))
    scores = evaluate(model, loaded, PT_RECIPES["anderson"], torch.float32, False, ALONE)
    result = json.loads((folder / "result.json").read_text())
    assert (result["samples"], result["top1"], result["top5"]) == (13, scores.top1, scores.top5)
    assert result["loss"] == pytest.approx(scores.loss, rel=1e-4)


def test_killed_in_mid_epoch_and_continued_bit_for_bit(world, undisturbed, dataset, tmp_path):
    """Killed with loader workers, continued without one."""
    out, (whole, _) = tmp_path / "run", undisturbed
    killed = world(2, *pretraining(dataset, out), "--workers", 1, signals=[[0, 1, 11, signal.SIGKILL]])
    assert killed.codes[0] == -signal.SIGKILL
    assert not (out / "result.json").exists()
    done = world(2, *pretraining(dataset, out))
    assert (done.codes, done.said()) == ([0, 0], "")
    assert "continuing at epoch 2, step 10" in done.out[0]
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(out).items())
    curves = [[(line["global_step"], line.get("loss")) for line in read_metrics(run)] for run in (out, whole)]
    assert curves[0] == curves[1]
    assert (out / "result.json").read_text() == (whole / "result.json").read_text()


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


def test_bad_samples_are_replaced_and_counted_and_ranks_stay_in_step(world, dataset, tmp_path):
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
    done = world(2, *arguments, record=True)
    assert done.codes == [0, 0], done.said()
    expected, replaced = [], []
    for epoch in range(EPOCHS):
        good = [index not in (3, 9, 33) for index in order(epoch)]
        following = [next(p for p in range(at, at + 50) if good[p % 50]) % 50 for at in range(STEPS * BATCH)]
        expected += epochs_of(np.array(order(epoch))[following].tolist())
        replaced.append(good[: STEPS * BATCH].count(False))
    assert trained_on(done.folder, 2) == expected
    said = [
        f"epoch {epoch}/{EPOCHS}  {count} bad samples replaced by others" for epoch, count in enumerate(replaced, 1)
    ]
    assert [line for line in said if line in done.out[0]] == said
    assert "bad sample, going on without it: " in done.said()
    assert "000000003: image cannot be decoded" in done.said()
    epochs = [line for line in read_metrics(tmp_path / "run") if line["split"] == "epoch"]
    assert [line["bad_samples"] for line in epochs] == replaced
    assert json.loads((tmp_path / "run" / "result.json").read_text())["samples"] == 12
