"""Checkpoints and the folder of a run: whole, damaged, hostile, of another run, on a full disk."""

import errno
import fcntl
import io
import json
import os
import resource
import shutil
import socket
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from fractalshards.errors import FractalError
from fractaltrain.checkpoint import Position, checkpoint_path, load_checkpoint, load_run, restore, save_checkpoint
from fractaltrain.config import RunConfig
from fractaltrain.log import append_metrics, read_metrics, rewind_metrics
from fractaltrain.optim import build_optimizer
from fractaltrain.run_folder import hold_folder, list_checkpoints, open_run
from tiny_training import ALONE, RECIPE, assert_same_run, run_tiny

pytestmark = pytest.mark.usefixtures("no_pictures")
HOSTILE = [b"", b"rubbish\n", b"(", b"\x80\x02X", b"cos\nsystem\n", b"\x80\x05.", b"V\n", b"PK\x03\x04abc"]


@pytest.mark.parametrize("data", [*HOSTILE, None], ids=repr)
def test_damaged_checkpoint_is_skipped(tmp_path, recwarn, data):
    """None: cut in half."""
    for epoch in (1, 2):
        save_checkpoint(RunConfig(tmp_path, keep=2), Position(epoch), {"model": nn.Identity()}, ALONE)
    newest = checkpoint_path(tmp_path, Position(2))
    newest.write_bytes(newest.read_bytes()[:300] if data is None else data)
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.position == Position(1)
    [problem] = found.skipped
    assert (problem.startswith(str(newest)), "\n" in problem) == (True, False)
    assert "weights_only" not in problem  # torch's advice to load the file nevertheless
    checkpoint_path(tmp_path, Position(1)).unlink()
    with pytest.raises(FractalError, match=newest.name) as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
    assert len(recwarn) == 0


def test_resume_after_a_damaged_checkpoint_is_bit_exact(tiny_run, tmp_path, interrupted, capfd):
    interrupted(25 + 22, tmp_path / "run")
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
    save_checkpoint(RunConfig(tmp_path, keep=2), Position(1), {"model": nn.Identity()}, ALONE)
    monkeypatch.setattr(torch, "load", Mock(side_effect=error))
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
    model = nn.Linear(3, 2)
    save_checkpoint(RunConfig(tmp_path, keep=1), Position(1), {"model": model}, ALONE)
    [path] = list_checkpoints(tmp_path)
    torch.save(torch.load(path, weights_only=True) | {"format": 2, "settings": {"seed": 0}}, path)
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert torch.equal(found.weights["weight"], model.weight)


def test_ctrl_c_while_saving_stays_ctrl_c(tmp_path, monkeypatch):
    """torch reports only that it could not finish the file."""

    class Interrupted(io.BytesIO):
        def write(self, data) -> int:
            if self.tell() > 200:
                raise KeyboardInterrupt
            return super().write(data)

    monkeypatch.setattr("fractaltrain.checkpoint.atomic_file", lambda path: nullcontext(Interrupted()))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(RunConfig(tmp_path, keep=1), Position(), {"model": nn.Linear(100, 100)}, ALONE)


def test_full_disk_is_one_line_and_leaves_no_half_checkpoint(tmp_path, fractaltrain, dataset):
    """A limit on file sizes stands in for a full disk."""
    options = ("--model", "test_resnet", "--batch-size", 25, "--image-size", 16, "--epochs", 1)
    arguments = ("pt", "--shards", dataset, *options, "--out", tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        outcome = fractaltrain(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (outcome.code, outcome.err.count("\n"), "checkpoint-0001-0000000.pt" in outcome.err) == (1, 1, True)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "run.json", "metrics.jsonl", "tb"}
    assert fractaltrain(*arguments).code == 0


# The folder of a run


def open_and_train(folder: Path, settings: dict) -> dict:
    """Open a run and save a checkpoint; return the ``run.json``."""
    with open_run(folder, settings, {"python": "3"}, "auto"):
        save_checkpoint(RunConfig(folder), Position(), {}, ALONE)
    return json.loads((folder / "run.json").read_text())


MEAN = {"recipe": {"mean": (0.5, 0.5)}}  # tuples become lists in JSON
SET = {"dataset_digest": "a1", "data_digest": "a1", "weights": "a1", "seed": 0}
DESCRIBED = {"dataset_recipe": {"kind": "single"}, "pretraining": {"recipe": {"lr": 0.1}}}  # not by earlier versions


@pytest.mark.parametrize(
    ("before", "after", "noun"),
    [
        (MEAN, MEAN, None),
        (MEAN, {"recipe": {"mean": (0.5, 0.6)}}, r"recipe\.mean"),
        (MEAN, {**MEAN, "new": 3}, "new"),
        *((SET, {**SET, name: value}, name) for name in ("dataset_digest", "data_digest") for value in ("b2", None)),
        (SET, {**SET, "seed": 1}, "seed"),
        ({"data": "cifar10", "data_digest": None}, {"data": "cifar100", "data_digest": None}, "cifar100"),
        (SET, SET | DESCRIBED, None),
        (SET | DESCRIBED, SET, None),
        (SET | DESCRIBED, {**SET, "dataset_digest": "b2"}, "dataset_digest"),
        (SET, SET | DESCRIBED | {"weights": "b2"}, "weights"),
    ],
    ids=str,
)
def test_run_is_continued_with_the_same_settings_only(tmp_path, before, after, noun):
    run = open_and_train(tmp_path / "a" / "run", before)
    if noun is None:
        with open_run(tmp_path / "a" / "run", after, {"python": "4"}, "must") as messages:
            assert [*messages] == []
        assert json.loads((tmp_path / "a" / "run" / "run.json").read_text())["environment"] == run["environment"]
    else:
        with pytest.raises(FractalError, match=noun):
            open_and_train(tmp_path / "a" / "run", after)


@pytest.mark.parametrize("name", ["dataset", "data"])
def test_dataset_that_moved_is_the_same_dataset(tmp_path, name):
    open_and_train(tmp_path, {**SET, name: "shards:/old"})
    with open_run(tmp_path, {**SET, name: "shards:/new"}, {}, "auto") as messages:
        [message] = messages
    assert all(place in message for place in ("/old", "/new"))


def test_second_run_in_a_folder_is_refused(tmp_path, fractaltrain, dataset, hold):
    command = ("pt", "--shards", dataset, "--model", "test_resnet", "--epochs", 1, "--batch-size", 25, "--out")
    assert fractaltrain(*command, tmp_path / "run").code == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}
    with hold(tmp_path / "run") as process:
        refused = fractaltrain(*command, tmp_path / "run")
        refused.assert_refused(1, f"{socket.gethostname()}, process {process.pid}, ")
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


def test_full_disk_is_named(small_disk):
    with suppress(OSError):
        (small_disk / "filler").write_bytes(bytes(1 << 20))
    with pytest.raises(OSError, match="No space") as caught, hold_folder(small_disk):
        pass
    assert caught.value.filename == str(small_disk / ".lock")


def test_run_on_a_file_system_without_locks_warns(tmp_path, monkeypatch, caplog):
    caplog.set_level("WARNING")
    monkeypatch.setattr(fcntl, "lockf", Mock(side_effect=OSError(errno.ENOSYS, "Function not implemented")))
    run_tiny(tmp_path / "run", replace(RECIPE, epochs=1))
    assert sum(str(tmp_path / "run") in message for message in caplog.messages) == 1


def test_resume_never_and_must(tmp_path, interrupted):
    """A run that trained nothing is replaced by one with other settings; others are not."""
    recipe = replace(RECIPE, epochs=1)
    with pytest.raises(FractalError, match="--resume must"):
        run_tiny(tmp_path / "run", recipe, resume="must")
    assert not (tmp_path / "run").exists()
    interrupted(1, tmp_path / "run", recipe, seed=1)
    run_tiny(tmp_path / "run", recipe, resume="never")
    with pytest.raises(FractalError, match="seed"):
        run_tiny(tmp_path / "run", recipe, seed=1)
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


BAD_SETTINGS = {
    "crop": "middle", "mean": [0.5, 0.5], "std": "wide", "epochs": 1.5, "lr": -1, "weight_decay": None,
    "classes": 0, "image_size": -1, "precision": "torch.load",
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_run_json_with_bad_settings_is_refused(tiny_run, tmp_path, name):
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    run = json.loads((folder / "run.json").read_text())
    run["settings"] |= {"model": "test_resnet", "classes": 10}
    (folder / "run.json").write_text(json.dumps(run))
    assert json.loads(json.dumps(vars(load_run(folder).settings.recipe))) == run["settings"]["recipe"]
    (run["settings"] if name in run["settings"] else run["settings"]["recipe"])[name] = BAD_SETTINGS[name]
    for text in (json.dumps(run), "{", '{"settings": {"model": 3}}', "[]", '{"settings": null}'):
        (folder / "run.json").write_text(text)
        with pytest.raises(FractalError, match=rf"run\.json.*{name if text == json.dumps(run) else ''}"):
            load_run(folder)
