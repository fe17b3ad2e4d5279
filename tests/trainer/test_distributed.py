"""Several ranks: what they train on, how signals stop them, how they fail together, and that they continue exactly."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from building import is_running, wait_until, workers_of
from damages import overwrite
from fractalshards.errors import FractalError, UsageError
from fractalshards.manifest import read_record
from fractaltrain import distributed
from fractaltrain.log import read_metrics
from fractaltrain.run_folder import list_checkpoints
from fractaltrain.stream.order import epoch_order, training_positions
from packing import write_tar
from tiny_training import assert_same_run

EPOCHS, BATCH, STEPS = 2, 4, 12  # of 50 samples
LAUNCHED = Path(__file__).parents[1] / "support" / "launched.py"


def pretraining(dataset: Path, out: Path, *more: object) -> tuple[object, ...]:
    return (
        "pt", "--shards", dataset, "--out", out, "--model", "test_resnet", "--epochs", EPOCHS, "--batch-size", BATCH,
        "--image-size", 32, "--window", 2, "--save-every-minutes", 0, *more,
    )  # fmt: skip


ORDERS = [epoch_order([20, 13, 17], seed=0, epoch=epoch, window=2).tolist() for epoch in range(EPOCHS)]
WHOLE_ORDER = [index for order in ORDERS for index in order[: STEPS * BATCH]]


def damage(folder: Path, shard: str, *places: int) -> None:
    offsets = read_record(folder, shard, "single").offsets
    for place in places:
        overwrite(folder / shard, offsets[place] + 512 + 60, b"garbage" * 20)


@pytest.fixture(scope="module")
def undisturbed(ranks, dataset, tmp_path_factory):
    """A finished run of two ranks with a loader worker each: its folder, and how it ended."""
    folder = tmp_path_factory.mktemp("two") / "run"
    ended = ranks(2, *pretraining(dataset, folder), "--workers", 1)
    assert (ended.codes, ended.stderr) == ([0, 0], "")
    return folder, ended


def test_ranks_train_on_the_epoch_order(undisturbed):
    for rank in range(2):
        positions = training_positions(50, BATCH, rank, 2, pad=False)
        expected = [batch.tolist() for order in ORDERS for batch in np.array(order)[positions]]
        assert undisturbed[1].keys[rank] == expected


def test_run_killed_with_four_ranks_continues_with_one(ranks, dataset, tmp_path):
    arguments = pretraining(dataset, tmp_path / "run", "--model", "test_vit")
    killed = ranks(4, *arguments, signals=[[rank, STEPS + 11, signal.SIGKILL] for rank in range(4)])
    assert killed.codes == [-signal.SIGKILL] * 4
    done = ranks(1, *arguments, "--workers", 2)
    assert done.codes == [0], done.stderr
    before = (STEPS + 10) * BATCH
    assert (killed.trained_on(), done.trained_on()) == (WHOLE_ORDER[:before], WHOLE_ORDER[before:])


def test_nodes_split_gives_each_machine_its_own_samples(ranks, write_dataset, tmp_path):
    """There are fewer images to evaluate on than ranks."""
    dataset = write_dataset(tmp_path / "shards", train=(20, 13, 17), val=3)
    ended = ranks(4, *pretraining(dataset, tmp_path / "run", "--model", "test_vit", "--nodes-split"), nodes=2)
    assert ended.codes == [0] * 4, ended.stderr
    for node in range(2):
        seen = {index for rank in (2 * node, 2 * node + 1) for batch in ended.keys[rank][:STEPS] for index in batch}
        assert seen == {*ORDERS[0][node * STEPS * BATCH // 2 :][: STEPS * BATCH // 2]}
    assert json.loads((tmp_path / "run" / "result.json").read_text())["samples"] == 3


def test_killed_run_resumes_bit_exactly(ranks, undisturbed, dataset, tmp_path):
    """Killed with loader workers, continued without."""
    arguments = pretraining(dataset, tmp_path / "run")
    killed = ranks(2, *arguments, "--workers", 1, signals=[[rank, STEPS + 11, signal.SIGKILL] for rank in range(2)])
    assert killed.codes == [-signal.SIGKILL] * 2
    done = ranks(2, *arguments)
    assert (done.codes, done.stderr) == ([0, 0], "")
    assert "epoch 2, step 10" in done.out[0]
    assert_same_run(tmp_path / "run", undisturbed[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_one_rank_saves_and_stops_all(ranks, undisturbed, dataset, tmp_path, number):
    """Between two lines of the metrics; the same command continues bit-exactly."""
    arguments = pretraining(dataset, tmp_path / "run", "--save-every-minutes", 10)
    stopped = ranks(2, *arguments, "--workers", 1, signals=[[1, STEPS + 4, number]])
    assert stopped.codes == [75, 75]
    assert number.name in stopped.err[0]
    assert list_checkpoints(tmp_path / "run")[-1].name == "checkpoint-0001-0000004.pt"
    done = ranks(2, *arguments, "--resume", "must")
    assert (done.codes, done.stderr) == ([0, 0], "")
    assert_same_run(tmp_path / "run", undisturbed[0])


def test_batch_that_ranks_cannot_share_is_one_line(ranks, dataset, tmp_path):
    """``--nproc`` is checked before any rank starts; torchrun says how many there are only to them."""
    ended = ranks(4, *pretraining(dataset, tmp_path / "run", "--batch-size", 6))
    assert (ended.codes[0], ended.err[0].count("\n"), "--batch-size" in ended.err[0]) == (2, 1, True)
    assert ended.err[0].startswith("error: ")


def test_divergence_names_the_samples_of_all_ranks(ranks, dataset, tmp_path):
    ended = ranks(2, *pretraining(dataset, tmp_path / "run", "--lr", "1e30", "--batch-size", 8))
    samples = [word.strip(",;") for word in ended.err[0].split() if word.strip(",;").isdigit() and len(word) > 8]
    assert len(set(samples)) == 8


def test_bad_samples_are_replaced_and_counted(ranks, dataset, tmp_path):
    folder = shutil.copytree(dataset, tmp_path / "bad")
    damage(folder, "train-000000.tar", 3, 9)
    damage(folder, "train-000002.tar", 0)
    damage(folder, "val-000000.tar", 5)
    done = ranks(2, *pretraining(folder, tmp_path / "run", "--on-bad-sample", "skip"))
    assert done.codes == [0, 0], done.stderr
    expected, replaced = [], []
    for order in ORDERS:
        good = [index not in (3, 9, 33) for index in order]
        used = [next(p for p in range(at, at + 50) if good[p % 50]) % 50 for at in range(STEPS * BATCH)]
        expected += [order[position] for position in used]
        replaced.append(good[: STEPS * BATCH].count(False))
    assert done.trained_on() == expected
    assert "000000003" in done.stderr
    epochs = [line for line in read_metrics(tmp_path / "run") if line["split"] == "epoch"]
    assert [line["bad_samples"] for line in epochs] == replaced
    assert json.loads((tmp_path / "run" / "result.json").read_text())["samples"] == 12


@pytest.mark.parametrize(
    ("environment", "noun"),
    [({"RANK": ""}, "RANK"), ({"WORLD_SIZE": "two"}, "WORLD_SIZE"), ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2")],
)
def test_wrong_environment_is_an_error(monkeypatch, environment, noun):
    """As of ``RANK=$SLURM_PROCID`` outside of srun."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", lambda *arguments, **options: None)
    with pytest.raises(UsageError, match=noun), distributed.join_world():
        pass


def test_missing_process_is_warned_of_before_it_is_an_error(monkeypatch, caplog):
    def wait(*arguments: object, **options: object) -> None:
        wait_until(lambda: caplog.messages)
        raise dist.DistStoreError("Timed out.\nTraceback")

    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_WARNING_SECONDS", 0.001)
    monkeypatch.setattr(dist, "init_process_group", wait)
    with pytest.raises(FractalError) as caught, distributed.join_world():
        pass
    assert all("nowhere:9" in line and "\n" not in line for line in (*caplog.messages, str(caught.value)))


# The launcher, --nproc 2: real processes, each of which imports PyTorch.


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def killed_at_the_end() -> Iterator[None]:
    """Kill the processes that a failed test leaves."""
    yield
    while STARTED:
        STARTED.pop().kill()


def start(*words: object, **options: Any) -> subprocess.Popen[str]:
    """Start Python in a session of its own."""
    command = [sys.executable, *map(str, words)]
    STARTED.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, **options))
    return STARTED[-1]


def wait_for(*paths: Path) -> None:
    wait_until(lambda: all(path.exists() and path.stat().st_size for path in paths))


def save_slowly(folder: Path, seconds: int = 0, ready: bool = True, **options: Any) -> subprocess.Popen[str]:
    """Start ranks that wait for a signal, and wait until they do."""
    (folder / "seconds").write_text(str(seconds))
    launcher = start(LAUNCHED, "save_slowly", folder, **options)
    if ready:
        wait_for(folder / "ready-0", folder / "ready-1")
    return launcher


def errors(text: str) -> list[str]:
    """Return the lines but the warnings: ranks of a busy machine may wait for each other, and say so."""
    return [line for line in text.splitlines() if not line.startswith("warning: ")]


@pytest.mark.parametrize(
    ("number", "seconds"), [(signal.SIGTERM, 0), pytest.param(signal.SIGUSR1, 20, marks=pytest.mark.slow)]
)
def test_launcher_forwards_signals_and_waits_for_saving(tmp_path, number, seconds):
    launcher = save_slowly(tmp_path, seconds)
    launcher.send_signal(number)
    _, err = launcher.communicate(timeout=seconds + 60)
    assert (launcher.returncode, err.count("\n"), number.name in err) == (75, 1, True)
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_launcher_ends_when_a_rank_is_killed(tmp_path):
    """Also if the other rank, which loses its connection, has failed before the launcher looks."""
    temporary = tmp_path / "é tmp"
    temporary.mkdir()
    launcher = save_slowly(tmp_path, env=os.environ | {"TMPDIR": str(temporary)})
    other, killed = workers_of(launcher.pid)
    launcher.send_signal(signal.SIGSTOP)
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: not is_running(other))
    launcher.send_signal(signal.SIGCONT)
    _, err = launcher.communicate(timeout=60)
    assert (launcher.returncode, err.count("\n"), "SIGKILL" in err) == (1, 1, True)
    assert not [*temporary.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("ready", [True, False])
def test_launcher_killed_takes_its_ranks_down(tmp_path, ready):
    launcher = save_slowly(tmp_path, ready=ready)
    wait_until(lambda: len(workers_of(launcher.pid)) == 2)
    ranks = workers_of(launcher.pid)
    launcher.kill()
    launcher.communicate()
    wait_until(lambda: not any(map(is_running, ranks)))


@pytest.mark.slow
def test_damaged_sample_ends_all_ranks_with_the_error_of_the_rank_that_read_it(dataset, tmp_path):
    folder = shutil.copytree(dataset, tmp_path / "bad")
    damage(folder, "train-000000.tar", 3)
    arguments = pretraining(folder, tmp_path / "run", "--nproc", 2)
    training = start("-m", "fractaltrain", *arguments, stdout=subprocess.DEVNULL)
    [error] = errors(training.communicate(timeout=120)[1])
    assert (training.returncode, error.startswith("error: ")) == (1, True)
    assert [noun for noun in ("train-000000.tar", "000000003") if noun not in error] == []


@pytest.mark.slow
def test_tars_of_other_programs_are_indexed_by_one_rank(tmp_path, image_file):
    files = {}
    for number in range(4):
        files |= {f"{number}.png": image_file("PNG", 8, 8, number), f"{number}.cls": b"%d" % number}
    write_tar(tmp_path / "theirs" / "0.tar", files)
    launcher = start(LAUNCHED, "open_tars", tmp_path)
    _, err = launcher.communicate(timeout=120)
    assert (launcher.returncode, err) == (0, "")
    assert [(tmp_path / f"labels-{rank}").read_text() for rank in range(2)] == ["[0, 1, 2, 3]"] * 2


@pytest.mark.slow
def test_signal_to_the_command_saves_and_resume_is_bit_exact(undisturbed, dataset, tmp_path):
    """The real command with two ranks: exit code 75, then the same command. A full pipe keeps it from ending before."""
    epochs = ("--epochs", EPOCHS, "--nproc", 2, "--workers", 1)
    words = ("-m", "fractaltrain", *pretraining(dataset, tmp_path / "run", *epochs))
    reader, writer = os.pipe()
    os.write(writer, bytes(fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)))
    training = start(*words, stdout=writer)
    os.close(writer)
    wait_for(tmp_path / "run" / "metrics.jsonl")
    os.kill(workers_of(training.pid)[1], signal.SIGTERM)
    with open(reader, "rb") as output:
        output.read()
    [error] = errors(training.communicate(timeout=120)[1])
    assert (training.returncode, "SIGTERM" in error) == (75, True)
    done = start(*words, stdout=subprocess.DEVNULL)
    _, err = done.communicate(timeout=240)
    assert (done.returncode, errors(err)) == (0, [])
    assert_same_run(tmp_path / "run", undisturbed[0])


@pytest.mark.slow
@pytest.mark.parametrize("command", [("--nproc", 2), ()])
def test_ctrl_c_ends_a_training_at_once(dataset, tmp_path, command):
    training = start("-m", "fractaltrain", *pretraining(dataset, tmp_path / "run", "--epochs", 5000, *command))
    wait_for(tmp_path / "run" / "metrics.jsonl")
    os.killpg(training.pid, signal.SIGINT)
    _, err = training.communicate(timeout=60)
    assert (training.returncode, len(errors(err))) == (130, 1)


@pytest.mark.slow
def test_torchrun_starts_the_same_run(undisturbed, dataset, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    command = (*torchrun, "-m", "fractaltrain", *pretraining(dataset, tmp_path / "run"))
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", undisturbed[0])
