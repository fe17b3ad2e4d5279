"""Pre-training on shards that lie elsewhere is pre-training on the same shards, and fails in one line."""

import json
import os
import pickle
from bisect import bisect_right
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import s3fs
import torch

from fractalshards.manifest import load_manifest
from fractalshards.remote.cache import open_cache
from fractaltrain.checkpoint import load_checkpoint
from fractaltrain.data.shards import ShardSource
from fractaltrain.log import read_metrics
from fractaltrain.stream.loader import Ahead
from fractaltrain.stream.order import epoch_order, repeated, shard_windows, training_positions

pytestmark = pytest.mark.usefixtures("impatient")
TRAIN = [f"train-00000{number}.tar" for number in range(3)]
NAMES = [*TRAIN, "val-000000.tar"]
OPTIONS = ("--model", "test_resnet", "--epochs", 2, "--batch-size", 10)


@pytest.fixture(scope="module")
def sizes(dataset: Path) -> list[int]:
    return [(dataset / name).stat().st_size for name in NAMES]


@pytest.fixture(scope="module")
def local_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Filled by ``local_run``: its runs by window."""
    return {}


@pytest.fixture
def local_run(
    dataset: Path, local_runs: dict[int, Path], tmp_path_factory: pytest.TempPathFactory, fractaltrain: Callable
) -> Callable[[int], Path]:
    """A run on the local folder, for each window."""

    def run(window: int) -> Path:
        if window not in local_runs:
            local_runs[window] = tmp_path_factory.mktemp("local") / "run"
            outcome = fractaltrain("pt", "--shards", dataset, "--out", local_runs[window], "--window", window, *OPTIONS)
            assert outcome.code == 0, outcome.err
        return local_runs[window]

    return run


def same_run(one: Path, other: Path) -> bool:
    curves = [[(line["global_step"], line.get("loss")) for line in read_metrics(run)] for run in (one, other)]
    states = [load_checkpoint(run).state["model"] for run in (one, other)]
    return (
        curves[0] == curves[1]
        and (one / "result.json").read_text() == (other / "result.json").read_text()
        and (one / "run.json").read_text() == (other / "run.json").read_text()
        and all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_from_a_web_server(fractaltrain, local_run, dataset, tmp_path, web, workers):
    server = web(dataset.parent)
    cache = ("--cache-dir", tmp_path / "cache", "--workers", workers)
    url = f"{server.url}/{dataset.name}?token=secret"
    outcome = fractaltrain("pt", "--shards", url, "--out", tmp_path / "run", "--window", 2, *OPTIONS, *cache)
    assert outcome.code == 0, outcome.err
    assert same_run(tmp_path / "run", local_run(2))
    assert [server.count(name) for name in NAMES] == [1] * 4
    assert "secret" not in outcome.out + outcome.err
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [load_manifest(dataset).content_digest()]


def test_from_s3(fractaltrain, local_run, dataset, tmp_path, bucket):
    s3fs.S3FileSystem().put(str(dataset), bucket, recursive=True)
    outcome = fractaltrain(
        "pt", "--shards", f"{bucket}/{dataset.name}/", "--out", tmp_path / "run", "--window", 2, *OPTIONS,
        "--cache-dir", tmp_path / "cache", "--workers", 1,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert same_run(tmp_path / "run", local_run(2))


def test_a_cache_smaller_than_the_dataset(fractaltrain, local_run, dataset, tmp_path, web, sizes):
    server = web(dataset.parent)
    size = sorted(sizes)[-1] + sorted(sizes)[-2]
    outcome = fractaltrain(
        "pt", "--shards", f"{server.url}/{dataset.name}", "--out", tmp_path / "run", "--window", 1, *OPTIONS,
        "--cache-dir", tmp_path / "cache", "--cache-size", size, "--workers", 1,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert same_run(tmp_path / "run", local_run(1))
    folder = tmp_path / "cache" / load_manifest(dataset).content_digest()
    assert sum(path.stat().st_size for path in folder.glob("*.tar")) <= size
    assert sum(server.count(name) for name in NAMES) > 4


def test_two_ranks_with_two_workers_fetch_every_shard_once(world, dataset, tmp_path, web):
    server = web(dataset.parent)
    done = world(
        2, "pt", "--shards", f"{server.url}/{dataset.name}", "--out", tmp_path / "run", "--window", 2, *OPTIONS,
        "--cache-dir", tmp_path / "cache", "--workers", 2, record=True,
    )  # fmt: skip
    assert done.codes == [0, 0], done.said()
    assert [server.count(name) for name in NAMES] == [1] * 4
    for rank in range(2):
        lines = [json.loads(line) for line in (done.folder / f"keys-{rank}.jsonl").read_text().splitlines()]
        expected = []
        for epoch in range(2):
            order = epoch_order([20, 13, 17], seed=0, epoch=epoch, window=2)
            expected += order[training_positions(50, 10, rank, 2, pad=False)].tolist()
            expected.append(list(range(50 + rank, 63, 2)))
        assert [[int(key) for key in keys] for _, *keys in lines] == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_a_remote_that_dies_in_mid_epoch_is_one_line(fractaltrain, dataset, tmp_path, web, workers):
    server = web(dataset.parent)
    last = shard_windows(3, 0, 0, 1)[-1].item()
    server.faults[TRAIN[last]] = ["503", "forever"]
    arguments = (
        "pt", "--shards", f"{server.url}/{dataset.name}", "--out", tmp_path / "run", "--window", 1, *OPTIONS,
        "--cache-dir", tmp_path / "cache", "--workers", workers,
    )  # fmt: skip
    outcome = fractaltrain(*arguments)
    assert outcome.code == 1
    errors = [line for line in outcome.err.splitlines() if not line.startswith("fetching records: ")]
    expected = f"error: {server.url}/{dataset.name}/{TRAIN[last]}: the server answers 503 (tried 8 times)"
    assert errors == [expected]
    server.faults.clear()
    assert fractaltrain(*arguments).code == 0


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        (
            "URL",
            ["--cache-dir", "CACHE", "--cache-size", "50kB"],
            "does not hold the 16 shards that are shuffled together",
        ),
        ("URL", ["--cache-size", "many"], "--cache-size many: expected a size such as 20GB"),
        ("pipe:cat", [], "not a kind of URL that is taken"),
        ("simplecache::s3://x/y", [], "chained URLs are not taken"),
        ("here", ["--cache-size", "1GB"], "go with the URL of a dataset elsewhere only"),
        ("here", ["--cache-dir", "x"], "go with the URL of a dataset elsewhere only"),
    ],
)
def test_wrong_usage(fractaltrain, dataset, tmp_path, web, monkeypatch, url, options, message):
    monkeypatch.chdir(tmp_path)
    options = [option.replace("CACHE", str(tmp_path / "cache")) for option in options]
    outcome = fractaltrain("pt", "--shards", web(dataset).url if url == "URL" else url, *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_there_is_one_line(fractaltrain, dataset, tmp_path, web):
    outcome = fractaltrain("pt", "--shards", f"{web(dataset).url}/none", "--out", tmp_path / "run")
    assert outcome.code == 1
    assert "/none: no _info.json there" in outcome.err
    assert outcome.err.count("\n") == 1


def test_spawned_loader_workers_have_connections_and_files_of_their_own(dataset, tmp_path, web):
    server = web(dataset)
    cache = open_cache(server.url, tmp_path, 10**9, 1, "train")
    cache.prepare(lambda label, total, unit: nullcontext(lambda count: None))
    source = ShardSource(cache.manifest, "train", cache)
    local = ShardSource(load_manifest(dataset), "train")
    examples = [source.read(0), local.read(0)]
    before = set(os.listdir("/proc/self/fd"))
    copies = [pickle.loads(pickle.dumps(one)) for one in (source, local)]
    examples += [copy.read(0) for copy in copies]
    assert len(set(os.listdir("/proc/self/fd")) - before) == 2
    assert len({(example.key, example.image.tobytes(), example.label) for example in examples}) == 1
    copies[0].read(20)
    assert server.count(TRAIN[1]) == 1


@pytest.mark.parametrize("repeats", [1, 3])
def test_what_comes_next_is_said_once_per_window(repeats):
    said: list[list[str]] = []
    lengths = [4, 2, 3, 5, 1]
    names = [f"s{number}" for number in range(5)]
    ahead = Ahead(names, lengths, seed=3, window=2, repeats=repeats, want=lambda names: said.append([*names]))
    windows = [[shards.tolist() for shards in shard_windows(5, 3, epoch, 2)] for epoch in range(3)]
    for epoch in range(2):
        for position in range(16):  # with --pad a little more than there is
            ahead.reached(epoch, position)
    expected = []
    for epoch in range(2):
        ends = np.cumsum([sum(lengths[shard] for shard in shards) for shards in windows[epoch]])
        used = int(np.argmax(ends >= 15 // repeats)) + 1  # of three windows
        sequence = [*windows[epoch][:used], windows[epoch + 1][0]]
        expected += [sequence[number : number + 2] for number in range(len(sequence))]
    assert said == [[f"s{shard}" for shards in pair for shard in shards] for pair in expected]
    assert [sum(lengths[shard] for shard in shards) for shards in windows[0]] != [5, 5, 5]


def test_repeated_samples_are_fetched_before_their_positions_come():
    lengths, names = [4, 2, 3, 5, 1], [f"s{number}" for number in range(5)]
    said: list[list[str]] = []
    ahead = Ahead(names, lengths, seed=3, window=1, repeats=3, want=lambda names: said.append([*names]))
    starts = [sum(lengths[:number]) for number in range(5)]
    for position, sample in enumerate(repeated(epoch_order(lengths, 3, 0, 1), 3).tolist()):
        ahead.reached(0, position)
        assert said[-1][0] == names[bisect_right(starts, sample) - 1]
