"""How failures reach the user; real ones of two processes are in test_processes.py."""

import json
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from fractalshards.errors import FractalError, StoppedError, UsageError
from fractalshards.workers import sigterm_interrupts
from fractaltrain import distributed as world_module
from fractaltrain.distributed import World, _explain, _explain_all, join_world, launch


def failure(folder: Path, exitcode: int, message: str | None) -> ProcessFailure:
    path = folder / "error.json"
    if message is not None:
        extra = {"py_callstack": "Traceback: the place\n", "timestamp": "1"}
        path.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    return ProcessFailure(local_rank=1, pid=7, exitcode=exitcode, error_file=str(path))


@pytest.mark.parametrize(
    ("exitcode", "message", "expected", "shown"),
    [
        (1, "FractalError: x.tar: bad; fetch it again", "x.tar: bad; fetch it again", ""),
        (1, "UsageError: lower --batch-size", "lower --batch-size", ""),
        (1, "WorkerLostError: a worker was killed", "a worker was killed", ""),
        (1, "TypeError: oops", "rank 3 failed: TypeError: oops; please report this", "Traceback: the place\n"),
        (-9, None, "rank 3 was killed (Signal 9 (SIGKILL) received by PID 7); if memory ran out, lower", ""),
        (-2, None, "stopped by Ctrl-C, which saves nothing; the same command continues from the last checkpoint", ""),
    ],
)
def test_failure_of_a_process_is_told_as_this_ones(tmp_path, capfd, exitcode, message, expected, shown):
    error = _explain(3, failure(tmp_path, exitcode, message))
    assert str(error).startswith(expected)
    assert capfd.readouterr().err == shown
    assert isinstance(error, UsageError) == bool(message and message.startswith("UsageError"))  # exits with 2, not 1


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([None, "StoppedError: stopped by SIGUSR1; run"], "stopped by SIGUSR1; run"),
        ([None, None], "stopped by SIGTERM; run the same command to continue"),
    ],
)
def test_of_processes_that_stopped_one_says_why(tmp_path, messages, expected):
    """The first to end may have left it to another: then it wrote no error."""
    failures = {}
    for rank, message in enumerate(messages):
        folder = tmp_path / str(rank)
        folder.mkdir()
        failures[rank] = failure(folder, 75, message)
    error = _explain_all(ChildFailedError("fractaltrain", failures), signal.SIGTERM)
    assert (str(error), error.code) == (expected, 75)


def test_one_process_is_this_one_and_so_is_each_of_torchruns(monkeypatch):
    seen: list[str] = []
    launch(seen.append, "alone", 1)
    monkeypatch.setenv("RANK", "1")
    launch(seen.append, "under torchrun", 2)
    assert seen == ["alone", "under torchrun"]


def signalled_while_reading(number: int) -> None:
    """Where errors of ours mean that a file is damaged."""
    try:
        signal.raise_signal(number)
    except FractalError as error:
        raise FractalError("damaged") from error


def signalled_with_workers(number: int) -> None:
    with sigterm_interrupts():
        signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("entry", [signalled_while_reading, signalled_with_workers])
def test_a_signal_before_the_loop_is_one_line_and_the_code_of_a_stop(entry, number):
    before = signal.getsignal(number)
    with pytest.raises(StoppedError, match=f"^stopped by {number.name}; run the same command to continue$") as error:
        launch(entry, number, 1)
    assert error.value.code == 75
    assert signal.getsignal(number) == before


def test_a_signal_while_gpus_are_counted_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: signal.raise_signal(signal.SIGUSR1) or 0)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)  # else it would end the tests
    try:
        with pytest.raises(StoppedError, match=r"^stopped by SIGUSR1; run the same command to continue$"):
            launch(pytest.fail, "began", None)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_others_wait_for_the_first_process_that_says_it_is_at_work(monkeypatch):
    meeting = threading.Barrier(2)
    worked_on = threading.Event()
    said: dict[int, int] = {}
    told: list[int] = []

    def largest(self: World, value: int) -> int:
        said[self.rank] = value
        meeting.wait(30)
        found = max(said.values())
        meeting.wait(30)
        if self.main:
            told.append(value)
            if len(told) == 3:
                worked_on.set()
        return found

    monkeypatch.setattr(World, "max", largest)
    monkeypatch.setattr(world_module, "_AT_WORK_SECONDS", 0.0)
    first, second = (World(rank=rank, size=2, local_size=2, device=torch.device("cpu")) for rank in range(2))
    order = []

    def wait() -> None:
        with second.main_first():
            order.append("second")

    other = threading.Thread(target=wait, daemon=True)
    other.start()
    with first.main_first():
        assert worked_on.wait(30)
        order.append("first")
    other.join(30)
    assert order == ["first", "second"]
    assert told[-1] == 0
    assert set(told[:-1]) == {1}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer\nmore"),
            r"^rank 1 lost the other processes \(\[gloo.*Connection closed by peer\); see their messages$",
        ),
        (OSError(28, "No space left on device", "runs/x"), r"^runs/x: No space left on device; free some space"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), r"^cpu: out of memory; lower --batch-size"),
        (ValueError("Expected more than 1 value per channel when training, got"), r"^batch norm needs .*--batch-size"),
        (FractalError("ours"), r"^ours$"),
    ],
)
def test_errors_inside_a_world(monkeypatch, error, message):
    two = World(rank=1, size=2, local_size=2, device=torch.device("cpu"))
    monkeypatch.setattr(world_module, "_read_environment", lambda: two)
    monkeypatch.setattr(world_module, "_ECHO_SECONDS", 0.0)
    monkeypatch.setattr(world_module, "_meet", lambda _: dist.HashStore())
    with pytest.raises(FractalError, match=message), join_world():
        raise error


def test_threads_of_the_group_end_before_the_interpreter_does(monkeypatch):
    """One that is still about to let go of a tensor then would abort the process."""

    def meet(_: World) -> dist.Store:
        dist.init_process_group("gloo", store=(store := dist.HashStore()), rank=0, world_size=1)
        return store

    def threads() -> list[str]:
        return [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]

    before = len(threads())
    two = World(rank=0, size=2, local_size=2, device=torch.device("cpu"))
    monkeypatch.setattr(world_module, "_read_environment", lambda: two)
    monkeypatch.setattr(world_module, "_meet", meet)
    with join_world():
        cycle: list[object] = [dist.group.WORLD]
        cycle.append(cycle)
        del cycle
        assert len(threads()) > before + 1  # they only come to their names, which have gloo in them
    assert not [name for name in threads() if "gloo" in name]


def test_bugs_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"), join_world():
        raise RuntimeError("a bug")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = "4 processes on a machine with 2 GPUs; lower --nproc to 2"
    with pytest.raises(FractalError, match=message), join_world():
        pass
    with pytest.raises(FractalError, match=message):  # before any is started
        launch(pytest.fail, "began", 4)
