"""Checkpoints and the folder of a run: whole, damaged, hostile, of another run, on a full disk."""

import errno
import fcntl
import io
import json
import os
import resource
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from torch import nn

from fractalshards.errors import FractalError
from fractalshards.storage import atomic_file
from fractaltrain.checkpoint import (
    Position,
    checkpoint_path,
    load_checkpoint,
    load_run,
    restore,
    save_checkpoint,
)
from fractaltrain.config import RunConfig
from fractaltrain.log import append_metrics, read_metrics, rewind_metrics
from fractaltrain.optim import build_optimizer
from fractaltrain.run_folder import hold_folder, list_checkpoints, load_settings, open_run
from tiny_training import ALONE, RECIPE, assert_same_run, interrupt_before_step, run_tiny

pytestmark = pytest.mark.usefixtures("no_pictures")
HOSTILE = [b"", b"rubbish\n", b"(", b"\x80\x02X", b"cos\nsystem\n", b"\x80\x05.", b"V\n", b"PK\x03\x04abc"]


class Part(dict):
    """A state dict behind the method that optimisers and models have."""

    def state_dict(self) -> dict:
        return dict(self)


@pytest.mark.parametrize("data", [*HOSTILE, None], ids=repr)
def test_damaged_checkpoint_is_skipped(tmp_path, recwarn, data):
    """None: cut in half."""
    for epoch in (1, 2):
        save_checkpoint(RunConfig(tmp_path, keep=2), Position(epoch), {"model": Part()}, ALONE)
    newest = checkpoint_path(tmp_path, Position(2))
    newest.write_bytes(newest.read_bytes()[:300] if data is None else data)
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.position == Position(1)
    [problem] = found.skipped
    assert (problem.startswith(str(newest)), "\n" in problem) == (True, False)
    checkpoint_path(tmp_path, Position(1)).unlink()
    with pytest.raises(FractalError, match=newest.name) as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
    assert len(recwarn) == 0


def test_resume_after_a_damaged_checkpoint_is_bit_exact(tiny_run, tmp_path, monkeypatch, capfd):
    interrupt_before_step(monkeypatch, 25 + 22)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "run")
    monkeypatch.undo()
    newest = list_checkpoints(tmp_path / "run")[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    run_tiny(tmp_path / "run", keep=1)
    assert newest.name in capfd.readouterr().out
    assert_same_run(tmp_path / "run", tiny_run)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-0002-0000000.pt"]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_resume_with_another_memory_format_keeps_the_optimizer(tmp_path, name):
    """GPUs save convolutions channels last; fused updates take parameter, gradient and state in the order of memory."""

    def train(layout: torch.memory_format, steps: range) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 8, 3).to(memory_format=layout)
        parts = {"model": model, "optimizer": build_optimizer(model, replace(RECIPE, optimizer=name, lr=0.1))}
        if saved := load_checkpoint(tmp_path):
            restore(saved, parts)
        for step in steps:
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape))
            parts["optimizer"].step()
        save_checkpoint(RunConfig(tmp_path), Position(step + 1), parts, ALONE)
        return model.weight.detach()

    expected = train(torch.contiguous_format, range(4))
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    train(torch.channels_last, range(2))
    torch.testing.assert_close(train(torch.contiguous_format, range(2, 4)), expected)


def test_checkpoint_cannot_run_code(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path(tmp_path / "pwned").touch, ())

    torch.save({"format": 3, "position": Malicious()}, tmp_path / "checkpoint-0001-0000000.pt")
    with pytest.raises(FractalError, match="checkpoint-0001"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_checkpoint_too_large_for_memory_is_not_skipped(tmp_path, monkeypatch, error):
    """It may be whole, and the next save would remove it."""

    def load(path: Path, **options: object) -> None:
        raise error

    save_checkpoint(RunConfig(tmp_path, keep=2), Position(1), {"model": Part()}, ALONE)
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(FractalError, match="memory"):
        load_checkpoint(tmp_path)


def test_checkpoint_of_another_model_or_version_is_refused(tmp_path):
    folder, recipe = tmp_path / "run", replace(RECIPE, epochs=1)
    run_tiny(folder, recipe, keep=1)
    (path,) = list_checkpoints(folder)
    state = torch.load(path, weights_only=True)
    for content in ({**state, "model": nn.Linear(3, 2).state_dict()}, {**state, "format": 1}, {**state, "format": 2}):
        torch.save(content, path)
        with pytest.raises(FractalError, match=path.name) as error:
            run_tiny(folder, recipe)
        assert "\n" not in str(error.value)


def test_weights_of_version_0_1_can_be_used(tmp_path):
    """Its runs cannot be continued, but can be fine-tuned, evaluated and exported."""
    save_checkpoint(RunConfig(tmp_path, keep=1), Position(1), {"model": Part(weight=torch.ones(2))}, ALONE)
    [path] = list_checkpoints(tmp_path)
    torch.save(torch.load(path, weights_only=True) | {"format": 2, "settings": {"seed": 0}}, path)
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert torch.equal(found.weights["weight"], torch.ones(2))


def test_keep_bounds_the_number_of_checkpoints(tmp_path):
    run_tiny(tmp_path / "run", keep=2)
    names = [path.name for path in list_checkpoints(tmp_path / "run")]
    assert names == ["checkpoint-0001-0000020.pt", "checkpoint-0002-0000000.pt"]


def test_ctrl_c_while_saving_stays_ctrl_c(tmp_path, monkeypatch):
    """torch reports only that it could not finish the file."""

    class Interrupted(io.BytesIO):
        def write(self, data) -> int:
            if self.tell() > 200:
                raise KeyboardInterrupt
            return super().write(data)

    @contextmanager
    def interrupted_file(path: Path) -> Iterator[BinaryIO]:
        with atomic_file(path):
            yield Interrupted()

    monkeypatch.setattr("fractaltrain.checkpoint.atomic_file", interrupted_file)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(RunConfig(tmp_path, keep=1), Position(), {"model": Part(weight=torch.zeros(10_000))}, ALONE)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_one_line_and_leaves_no_half_checkpoint(tmp_path, fractaltrain, dataset):
    """A limit on file sizes stands in for a full disk."""
    arguments = ("pt", "--shards", dataset, "--model", "test_resnet", "--batch-size", 25, "--out", tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        outcome = fractaltrain(*arguments, "--epochs", 1, "--image-size", 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (outcome.code, outcome.err.count("\n"), "checkpoint-0001-0000000.pt" in outcome.err) == (1, 1, True)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "run.json", "metrics.jsonl", "tb"}
    assert fractaltrain(*arguments, "--epochs", 1, "--image-size", 16).code == 0


# The folder of a run


def open_and_train(folder: Path, settings: dict, python: str = "3") -> dict:
    """Open a run and save a checkpoint; return the ``run.json``."""
    with open_run(folder, settings, {"python": python}, "auto"):
        save_checkpoint(RunConfig(folder), Position(), {}, ALONE)
    return json.loads((folder / "run.json").read_text())


def test_same_settings_open_the_same_run(tmp_path):
    settings = {"model": "m", "recipe": {"mean": (0.5, 0.5)}}  # tuples become lists in JSON
    open_and_train(tmp_path / "a" / "run", settings)
    assert open_and_train(tmp_path / "a" / "run", settings, python="4")["environment"] == {"python": "3"}
    for other in ({"model": "m", "recipe": {"mean": (0.5, 0.6)}}, settings | {"new": 3}):
        with pytest.raises(FractalError, match=r"recipe\.mean|new"):
            open_and_train(tmp_path / "a" / "run", other)


def test_run_that_trained_nothing_is_replaced(tmp_path, fractaltrain, dataset):
    """Its first sample is damaged; the corrected command has other settings."""
    bad = shutil.copytree(dataset, tmp_path / "bad")
    for shard in bad.glob("*.tar"):
        shard.write_bytes(shard.read_bytes().replace(b"IDAT", b"IDOT"))
    command = ("pt", "--model", "test_resnet", "--epochs", 1, "--image-size", 16, "--out", tmp_path / "run", "--shards")
    assert fractaltrain(*command, bad, "--batch-size", 10).code == 1
    assert (tmp_path / "run" / "run.json").exists()
    done = fractaltrain(*command, dataset, "--batch-size", 25, "--resume", "never")
    assert (done.code, done.err) == (0, "")
    assert fractaltrain(*command, dataset, "--batch-size", 10).code == 1


@pytest.mark.parametrize("name", ["dataset", "data"])
def test_dataset_that_moved_is_the_same_dataset(tmp_path, name):
    before, after = ({name: place, f"{name}_digest": "a1", "seed": 0} for place in ("shards:/old", "shards:/new"))
    open_and_train(tmp_path, before)
    with open_run(tmp_path, after, {}, "auto") as messages:
        [message] = messages
    assert all(place in message for place in ("/old", "/new"))
    for other in (after | {f"{name}_digest": "b2"}, after | {f"{name}_digest": None}, after | {"seed": 1}):
        with pytest.raises(FractalError, match=str(tmp_path)):
            open_and_train(tmp_path, other)
    open_and_train(tmp_path / "named", {"data": "cifar10", "data_digest": None})
    with pytest.raises(FractalError, match="cifar100"):
        open_and_train(tmp_path / "named", {"data": "cifar100", "data_digest": None})


def test_run_continues_whether_or_not_it_describes_its_dataset(tmp_path):
    """Runs of earlier versions do not; the digests say that it is the same one."""
    digests = {"dataset_digest": "a1", "weights": "b2"}
    described = digests | {"dataset_recipe": {"kind": "single"}, "pretraining": {"recipe": {"lr": 0.1}}}
    for number, (before, after) in enumerate([(digests, described), (described, digests)]):
        open_and_train(tmp_path / str(number), before)
        with open_run(tmp_path / str(number), after, {}, "must") as messages:
            assert [*messages] == []
        for name in digests:
            with pytest.raises(FractalError, match=name):
                open_and_train(tmp_path / str(number), after | {name: "c3"})


def test_second_run_in_a_folder_is_refused(tmp_path, fractaltrain, dataset, hold):
    command = ("pt", "--shards", dataset, "--model", "test_resnet", "--epochs", 1, "--batch-size", 25, "--out")
    assert fractaltrain(*command, tmp_path / "run").code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}
    with hold(tmp_path / "run") as process:
        refused = fractaltrain(*command, tmp_path / "run")
        assert (refused.code, refused.err.count("\n")) == (1, 1)
        assert f"{socket.gethostname()}, process {process.pid}, " in refused.err
        assert {path: path.stat().st_mtime_ns for path in before} == before
        assert fractaltrain("eval", "--weights", tmp_path / "run", "--data", f"shards:{dataset}").code == 0
        assert fractaltrain(*command, tmp_path / "other").code == 0
    assert fractaltrain(*command, tmp_path / "run").code == 0


def test_lock_ends_with_its_holder_though_its_children_live(tmp_path, hold):
    """As loader workers may for a moment."""
    with hold(tmp_path, "os.fork() or (sys.stdin.read(), os._exit(0))") as process:
        process.kill()
        process.wait()
        with hold_folder(tmp_path):
            assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_run_on_a_file_system_without_locks_warns(tmp_path, monkeypatch, caplog):
    def lockf(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    run_tiny(tmp_path / "run", replace(RECIPE, epochs=1))
    assert sum(str(tmp_path / "run") in message for message in caplog.messages) == 1


def test_resume_never_and_must(tmp_path):
    recipe = replace(RECIPE, epochs=1)
    with pytest.raises(FractalError, match="--resume must"):
        run_tiny(tmp_path / "run", recipe, resume="must")
    assert not (tmp_path / "run").exists()
    run_tiny(tmp_path / "run", recipe, resume="never")
    with pytest.raises(FractalError, match="--resume never"):
        run_tiny(tmp_path / "run", recipe, resume="never")
    run_tiny(tmp_path / "run", recipe, resume="must")


def test_metrics_survive_a_cut_off_line_and_name_a_damaged_one(tmp_path):
    for step in (1, 2, 3):
        append_metrics(tmp_path, {"global_step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"global_st')
    assert [line["global_step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    rewind_metrics(tmp_path, 2)
    append_metrics(tmp_path, {"global_step": 9})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["global_step"] for line in lines] == [1, 2, 9]
    (tmp_path / "metrics.jsonl").write_bytes(b"\0\n")
    with pytest.raises(FractalError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("crop", "middle"), ("mean", [0.5, 0.5]), ("std", "wide"), ("epochs", 1.5), ("lr", None), ("lr", -1)),
        *(("classes", 0), ("image_size", -1), ("precision", "torch.load")),
    ],
)
def test_run_json_with_bad_settings_is_refused(tiny_run, tmp_path, name, value):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    run["settings"] |= {"model": "test_resnet", "classes": 10}
    (folder / "run.json").write_text(json.dumps(run))
    assert json.loads(json.dumps(vars(load_run(folder).settings.recipe))) == run["settings"]["recipe"]
    (run["settings"] if name in run["settings"] else run["settings"]["recipe"])[name] = value
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(FractalError, match=name) as error:
        load_run(folder)
    assert "run.json" in str(error.value)


@pytest.mark.parametrize("text", ["{", '{"settings": {"model": 3}}', "[]", '{"settings": null}'])
def test_damaged_run_json_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(FractalError, match=r"run\.json"):
        load_settings(tmp_path)
