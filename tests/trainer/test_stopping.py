"""Worlds of two and four processes with gloo that are signalled, killed or set up wrongly: how they end and go on."""

import json
import signal
import socket
from pathlib import Path

import pytest
import torch

from fractaltrain.checkpoint import list_checkpoints, load_checkpoint
from fractaltrain.run_folder import read_metrics


def pretraining(dataset: Path, out: Path, *more: object) -> tuple[object, ...]:
    return (
        "pt", "--shards", dataset, "--out", out, "--model", "test_resnet", "--epochs", 2, "--batch-size", 8,
        "--image-size", 16, "--save-every-minutes", 10, *more,
    )  # fmt: skip


def curve(folder: Path) -> list[tuple[object, ...]]:
    return [(line["split"], line["global_step"], line.get("loss"), line.get("lr")) for line in read_metrics(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved = load_checkpoint(folder)
    assert saved is not None
    return saved.state["model"]


@pytest.mark.parametrize(("number", "parts"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 2)])
def test_one_rank_is_signalled_and_all_stop_at_the_same_step(world, dataset, tmp_path, number, parts):
    """Between two lines of the metrics, with loader workers; the same command then gives the same curve."""
    out, expected = tmp_path / "run", tmp_path / "undisturbed"
    ended = world(2, *pretraining(dataset, expected, "--accumulate", parts))
    assert (ended.codes, ended.said()) == ([0, 0], "")
    arguments = pretraining(dataset, out, "--accumulate", parts)
    stopped = world(2, *arguments, "--workers", 1, signals=[[1, 1, 4, number]], agent=False)
    assert stopped.codes == [75, 75]
    assert stopped.said() == f"error: stopped by {number.name}; run the same command to continue\n"
    assert stopped.out[0].endswith(f"{out}: saved at epoch 2, step 4, as checkpoint-0001-0000004.pt\n")
    assert stopped.out[1] == ""
    assert list_checkpoints(out)[-1].name == "checkpoint-0001-0000004.pt"
    continued = world(2, *arguments, "--resume", "must")
    assert (continued.codes, continued.said()) == ([0, 0], "")
    assert f"{out}: continuing at epoch 2, step 4\n" in continued.out[0]
    assert curve(out) == curve(expected)
    wanted = weights(expected)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(out).items())


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_brings_the_others_down(world, dataset, tmp_path, size, rank):
    """They learn it from the launcher's SIGTERM while they wait inside a collective operation, and say nothing."""
    ended = world(size, *pretraining(dataset, tmp_path / "run"), signals=[[rank, 0, 3, signal.SIGKILL]])
    assert ended.codes == [-signal.SIGKILL if other == rank else -signal.SIGTERM for other in range(size)]
    assert ended.seconds < 10
    assert ended.said() == ""


@pytest.mark.slow
def test_killed_rank_without_a_launcher(world, dataset, tmp_path):
    """As with srun alone: the others wait for somebody to end them, and then one of them says what happened."""
    ended = world(4, *pretraining(dataset, tmp_path / "run"), signals=[[1, 0, 3, signal.SIGKILL]], agent=False)
    assert ended.codes == [1, -signal.SIGKILL, 1, 1]
    assert ended.seconds < 30
    assert ended.said().count("\n") == 1
    assert "lost the other processes (" in ended.said()


@pytest.mark.parametrize(
    ("size", "options", "code", "message"),
    [
        (2, ("--batch-size", 52), 2, "a batch of 52 is larger than the 50 training samples; lower --batch-size"),
        (4, ("--batch-size", 6), 2, "4 processes cannot share a batch of 6 equally; choose --batch-size 4 or another"),
        (4, ("--batch-size", 2), 2, "4 processes cannot share a batch of 2 equally; choose --batch-size 4 or another"),
        (2, ("--accumulate", 3), 2, "--accumulate 3"),
        (2, ("--model", "resnet51"), 2, "no model 'resnet51'"),
        (2, ("--resume", "must"), 1, "no run to continue"),
        (2, ("--lr", "1e30"), 1, "the loss is nan at epoch 1, step "),
    ],
)
def test_wrong_set_up_is_one_line_of_one_rank(world, dataset, tmp_path, size, options, code, message):
    ended = world(size, *pretraining(dataset, tmp_path / "run", *options))
    assert ended.seconds < 10
    assert message in ended.said()
    assert ended.said().startswith("error: ")
    assert ended.said().count("\n") == 1
    assert code in ended.codes
    assert set(ended.codes) <= {code, -signal.SIGTERM}


def test_loss_that_is_no_number_names_the_samples_of_all_ranks(world, dataset, tmp_path):
    """The weights of all are spoilt by the first step, so the second one's loss is bad everywhere: eight samples."""
    ended = world(2, *pretraining(dataset, tmp_path / "run", "--lr", "1e30"))
    samples = ended.said().split("on the samples ")[1].split(";")[0].split(", ")
    assert len(set(samples)) == 8
    assert all(len(sample) == 9 and sample.isdigit() for sample in samples)


def test_batch_norm_of_a_single_value(world, dataset, tmp_path):
    """A sample per rank, of which no more than a pixel is left."""
    ended = world(2, *pretraining(dataset, tmp_path / "run", "--batch-size", 2))
    assert ended.said().startswith("error: batch norm needs more than the one value per channel that it sees here; ")
    assert (ended.said().count("\n"), 1 in ended.codes) == (1, True)


def test_fewer_held_out_images_than_ranks(world, tmp_path, write_dataset):
    dataset = write_dataset(tmp_path / "shards", train=(50,), val=3)
    ended = world(4, *pretraining(dataset, tmp_path / "run"))
    assert (ended.codes, ended.said()) == ([0] * 4, "")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["samples"] == 3


def test_port_in_use(world, dataset, tmp_path):
    """Of srun's single process that is to open it."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = world(2, *pretraining(dataset, tmp_path / "run"), port=port)
    assert ended.codes == [1, -signal.SIGTERM]
    assert ended.said() == f"error: 127.0.0.1:{port}: the port is in use; choose another one (MASTER_PORT)\n"
