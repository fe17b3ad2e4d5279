"""What the trainer's tests share: small datasets made with the real writer, and the command run in this process."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import packing
from fractalshards.manifest import DatasetInfo, sample_key
from fractaltrain import log
from fractaltrain.cli import main
from tiny_training import before_step, run_tiny

CLASSES = 5
SIZE = 32


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def assert_refused(self, code: int, *nouns: str) -> None:
        """Assert that the command printed nothing but one line, an error with these nouns."""
        assert (self.code, self.out, self.err.count("\n")) == (code, "", 1), self.err
        assert self.err.startswith("error: ")
        assert [noun for noun in nouns if noun not in self.err] == [], self.err


def write_dataset(folder: Path, train: Sequence[int], val: int = 0) -> Path:
    """Shards of ``train[k]`` samples each, and a val shard: noise that is brighter for higher classes."""
    generator, indices = np.random.default_rng(0), count()

    def sample() -> tuple[str, tuple[np.ndarray, int]]:
        key, label = sample_key(index := next(indices)), index % CLASSES
        return key, (generator.integers(0, 100, (SIZE, SIZE, 3), np.uint8) + np.uint8(30 * label), label)

    shards = {"train": train, "val": [val] if val else []}
    splits = {split: [[sample() for _ in range(length)] for length in lengths] for split, lengths in shards.items()}
    info = DatasetInfo({"kind": "test"}, "single", CLASSES)
    return packing.write_dataset(folder, {split: samples for split, samples in splits.items() if samples}, info, SIZE)


@pytest.fixture(scope="session", name="write_dataset")
def writes_datasets() -> Callable[..., Path]:
    """The function above, for datasets of other sizes."""
    return write_dataset


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 training images in three unequal shards and 13 to validate, 32 x 32, five classes."""
    return write_dataset(tmp_path_factory.mktemp("shards") / "small", train=(20, 13, 17), val=13)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``KIND.json`` for three kinds and, in ``KIND``, the shards that it describes.

    They have 50 training images in three shards and 10 to validate, 32 x 32, five classes.
    """
    from building import run as fractalgen
    from fractalgen import executors

    folder = tmp_path_factory.mktemp("built")
    options = ["--n", "50", "--val", "10", "--classes", "5", "--size", "32", "--points", "500", "--shard-size", "20"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executors, "worker_pool", ThreadPoolExecutor)  # processes take a second to start
        for kind in ("single", "multi", "fractaldb"):
            file = folder / f"{kind}.json"
            recipe = ("recipe", "--kind", kind, *options, "--out", file)
            for command in (recipe, ("build", "--recipe", file, "--out", folder / kind)):
                result = fractalgen(*command)
                assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from more threads, and lose much to them where other tests are running."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fractaltrain.distributed.available_cores", lambda: 1)
        torch.set_num_threads(1)
        yield


@pytest.fixture
def fractaltrain(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs the command line in this process."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Outcome(int(end.value.code or 0), out, err)

    return run


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def pretrained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pre-training of two epochs on 16 x 16 pixels; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("pretrained") / "pt"
    options = ("--model", "test_resnet", "--image-size", "16", "--batch-size", "10", "--epochs", "2", "--quiet")
    with pytest.raises(SystemExit) as end:
        main(["pt", "--shards", str(dataset), "--out", str(folder), *options])
    assert not end.value.code
    return folder


@pytest.fixture
def hold() -> Callable[..., AbstractContextManager[subprocess.Popen[bytes]]]:
    """Function that starts a process that holds a folder and then runs ``more``; it is killed at the end."""

    @contextmanager
    def start(folder: Path, more: str = "pass") -> Iterator[subprocess.Popen[bytes]]:
        code = f"""
import os, sys, time
from pathlib import Path
from fractaltrain.run_folder import hold_folder
with hold_folder(Path(sys.argv[1])):
    {more}
    print("held", flush=True)
    time.sleep(600)
"""
        command = [sys.executable, "-c", code, folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout.readline() == b"held\n"
                yield process
            finally:
                process.kill()

    return start


@dataclass(frozen=True)
class Ended:
    """How ranks ended: exit codes and what they wrote, by rank; ``keys[rank]`` are the samples of its batches."""

    codes: list[int]
    out: list[str]
    err: list[str]
    keys: list[list[list[int]]]

    @property
    def stderr(self) -> str:
        return "".join(self.err)

    def trained_on(self) -> list[int]:
        """Sample indices of all global batches, one after the other."""
        return [index for batches in zip(*self.keys, strict=True) for batch in batches for index in batch]


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ended]:
    """Function that runs the command line in several ranks, as torchrun would; see ``run_rank``."""
    from one_rank import run_rank

    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        context.set_forkserver_preload(["one_rank"])
        forkserver.ensure_running()

    def run(size: int, *arguments: object, nodes: int = 1, signals: Sequence[tuple[int, int, int]] = ()) -> Ended:
        folder = tmp_path_factory.mktemp("ranks")
        given = size, folder, [str(argument) for argument in arguments], nodes, signals
        processes = [context.Process(target=run_rank, args=(rank, *given)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        out, err, keys = (
            [path.read_text() if path.exists() else "" for path in (folder / name.format(rank) for rank in range(size))]
            for name in ("out-{}", "err-{}", "keys-{}.jsonl")
        )
        batches = [[[int(key) for key in json.loads(line)] for line in text.splitlines()] for text in keys]
        return Ended([process.exitcode for process in processes], out, err, batches)

    return run


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run of ``tiny_training``; tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    run_tiny(folder)
    return folder


@pytest.fixture
def interrupted() -> Callable[..., None]:
    """Function like ``run_tiny`` that presses Ctrl-C before a step of the process, counted from 1."""

    def run(step: int, folder: Path, *arguments: object, **options: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            before_step(patch, step, Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run_tiny(folder, *arguments, **options)

    return run


@pytest.fixture
def no_pictures(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than these runs; the undisturbed one has its picture."""
    monkeypatch.setattr(log, "draw_history", lambda *_: None)
