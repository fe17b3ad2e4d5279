"""Pre-training on shards that lie elsewhere is pre-training on the same shards, and fails in one line."""

import os
import pickle

import pytest

from fractalshards.manifest import load_manifest
from fractalshards.reader import StoredSplit
from fractalshards.remote.cache import open_cache
from fractaltrain.stream.order import epoch_order, shard_windows
from tiny_training import assert_same_run

pytestmark = pytest.mark.usefixtures("impatient")
TRAIN = [f"train-00000{number}.tar" for number in range(3)]
NAMES = [*TRAIN, "val-000000.tar"]
OPTIONS = ("--model", "test_resnet", "--epochs", 2, "--batch-size", 10)


def test_remote_run_with_a_small_cache_equals_a_local_run(fractaltrain, dataset, tmp_path, web, monkeypatch):
    server = web(dataset.parent)
    size = sum(sorted((dataset / name).stat().st_size for name in NAMES)[-2:])
    url = f"{server.url}/{dataset.name}?token=secret"
    cache = ("--cache-dir", tmp_path / "cache", "--cache-size", size, "--workers", 1)
    remote = fractaltrain("pt", "--shards", url, "--out", tmp_path / "run", "--window", 1, *OPTIONS, *cache)
    local = fractaltrain("pt", "--shards", dataset, "--out", tmp_path / "local", "--window", 1, *OPTIONS)
    assert (remote.code, local.code) == (0, 0), remote.err + local.err
    assert_same_run(tmp_path / "run", tmp_path / "local")
    assert (tmp_path / "run" / "run.json").read_text() == (tmp_path / "local" / "run.json").read_text()
    assert "secret" not in remote.out + remote.err
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name == load_manifest(dataset).content_digest()
    assert sum(path.stat().st_size for path in folder.glob("*.tar")) <= size
    assert sum(server.count(name) for name in NAMES) > 4
    monkeypatch.delattr("fractaltrain.pretrain.prefetching")  # what is in memory needs no shards
    kept = fractaltrain("pt", "--shards", url, "--out", tmp_path / "kept", "--window", 1, "--memory", *OPTIONS, *cache)
    assert kept.code == 0, kept.err
    assert_same_run(tmp_path / "kept", tmp_path / "local")
    assert (tmp_path / "kept" / "run.json").read_text() == (tmp_path / "local" / "run.json").read_text()


@pytest.mark.slow
def test_ranks_and_workers_fetch_every_shard_once(ranks, dataset, tmp_path, web):
    server = web(dataset.parent)
    ended = ranks(
        2, "pt", "--shards", f"{server.url}/{dataset.name}", "--out", tmp_path / "run", "--window", 2, *OPTIONS,
        "--cache-dir", tmp_path / "cache", "--workers", 2,
    )  # fmt: skip
    assert ended.codes == [0, 0], ended.stderr
    assert [server.count(name) for name in NAMES] == [1] * 4
    orders = [epoch_order([20, 13, 17], seed=0, epoch=epoch, window=2) for epoch in range(2)]
    assert ended.trained_on() == [index for order in orders for index in order[:50].tolist()]


def test_remote_lost_during_an_epoch_is_one_line(fractaltrain, dataset, tmp_path, web):
    server = web(dataset.parent)
    last = shard_windows(3, 0, 0, 1)[-1].item()
    server.faults[TRAIN[last]] = ["503", "forever"]
    arguments = (
        "pt", "--shards", f"{server.url}/{dataset.name}", "--out", tmp_path / "run", "--window", 1, *OPTIONS,
        "--cache-dir", tmp_path / "cache", "--workers", 1,
    )  # fmt: skip
    outcome = fractaltrain(*arguments)
    assert outcome.code == 1
    *notes, error = outcome.err.splitlines()
    assert all(line.startswith(("note: ", "preparing the cache: ")) for line in notes), outcome.err
    assert error.startswith(f"error: {server.url}/{dataset.name}/{TRAIN[last]}: ")
    server.faults.clear()
    assert fractaltrain(*arguments).code == 0


@pytest.mark.parametrize(
    ("url", "options", "noun"),
    [
        ("URL", ["--cache-dir", "CACHE", "--cache-size", "50kB"], "--cache-size"),
        ("pipe:cat", [], "URL"),
    ],
)
def test_wrong_usage_is_one_line(fractaltrain, dataset, tmp_path, web, monkeypatch, url, options, noun):
    monkeypatch.chdir(tmp_path)
    options = [option.replace("CACHE", str(tmp_path / "cache")) for option in options]
    outcome = fractaltrain("pt", "--shards", web(dataset).url if url == "URL" else url, *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert noun in outcome.err
    assert outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_spawned_loader_workers_have_separate_connections_and_files(dataset, tmp_path, web):
    server = web(dataset)
    cache = open_cache(server.url, tmp_path, 10**9, 1, "train")
    cache.prepare()
    source = StoredSplit(cache.manifest, "train", cache.open)
    local = StoredSplit(load_manifest(dataset), "train")
    examples = [source.read(0), local.read(0)]
    before = set(os.listdir("/proc/self/fd"))
    copies = [pickle.loads(pickle.dumps(one)) for one in (source, local)]
    examples += [copy.read(0) for copy in copies]
    assert len(set(os.listdir("/proc/self/fd")) - before) == 2
    assert len({(example.key, example.image.tobytes(), example.label) for example in examples}) == 1
    copies[0].read(20)
    assert server.count(TRAIN[1]) == 1
