"""``fractaltrain pt`` on rendered samples, on samples in memory, and on remote shards is training on local shards."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from building import run as fractalgen
from fractalshards.manifest import load_manifest
from fractalshards.recipe_file import export_recipe
from fractaltrain.log import read_metrics
from fractaltrain.stream.order import epoch_order, shard_windows
from tiny_training import assert_same_run, weights

pytestmark = pytest.mark.usefixtures("impatient")
OPTIONS = ("--model", "test_resnet", "--epochs", 2, "--batch-size", 10, "--window", 2)
KINDS = ("single", "multi", "fractaldb")
TRAIN = [f"train-00000{number}.tar" for number in range(3)]
NAMES = [*TRAIN, "val-000000.tar"]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_the_shards_bit_for_bit(kind, fractaltrain, built, tmp_path):
    memory = ("--memory", "--cache-dir", tmp_path / "cache")
    ways = {
        "shards": ("--shards", built / kind, "--workers", 0),
        "rendered": ("--render", built / f"{kind}.json", "--workers", 2),
        "rendered once": ("--render", built / f"{kind}.json", *memory),
        "decoded once": ("--shards", built / kind, *memory, "--workers", 1),
    }
    for name, options in islice(ways.items(), 4 if kind == "multi" else 2):
        outcome = fractaltrain("pt", *options, *OPTIONS, "--out", tmp_path / name)
        assert outcome.code == 0, outcome.err
        assert_same_run(tmp_path / name, tmp_path / "shards")
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert (result["samples"], "map" in result, "top1" in result) == (10, kind == "multi", kind != "multi")
    assert not list((tmp_path / "cache").rglob("*.pixels"))


def test_fresh_run_shows_other_images_after_the_first_epoch(fractaltrain, built, tmp_path):
    render = ("pt", "--render", built / "single.json", *OPTIONS, "--out")
    stored, fresh = fractaltrain(*render, tmp_path / "stored"), fractaltrain(*render, tmp_path / "fresh", "--fresh")
    assert (stored.code, fresh.code) == (0, 0), stored.err + fresh.err
    one, other = ([line.get("loss") for line in read_metrics(tmp_path / name)] for name in ("stored", "fresh"))
    assert one[:1] == other[:1]
    assert one[-1] != other[-1]
    again = fractaltrain(*render, tmp_path / "fresh")
    assert (again.code, "fresh" in again.err) == (1, True)


def test_passes_make_one_epoch_and_the_recipe_of_the_shards_continues_the_run(fractaltrain, built, tmp_path):
    """Two epochs of two passes take the same samples as four of one, and learn the same.

    The digest of a dataset that was built is in its recipe, so it is the same dataset.
    """
    losses = []
    for name, options in (("once", ("--epochs", 4)), ("twice", ("--set", "passes=2"))):
        done = fractaltrain("pt", "--shards", built / "single", *OPTIONS, *options, "--out", tmp_path / name)
        assert done.code == 0, done.err
        losses.append([line["train_loss"] for line in read_metrics(tmp_path / name) if "train_loss" in line])
    first, second, third, fourth = losses[0]
    assert losses[1] == pytest.approx([(first + second) / 2, (third + fourth) / 2])
    expected = weights(tmp_path / "twice")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "once").items())
    (tmp_path / "single.json").write_bytes(export_recipe(load_manifest(built / "single")))
    options = (*OPTIONS, "--set", "passes=2", "--out", tmp_path / "twice")
    again = fractaltrain("pt", "--render", tmp_path / "single.json", *options)
    assert (again.code, "finished" in again.out) == (0, True)
    other = fractaltrain("pt", "--render", built / "single.json", *options)
    assert (other.code, "dataset_digest" in other.err) == (1, True)


@pytest.mark.slow
def test_ranks_share_in_memory_what_the_shards_hold(ranks, built, tmp_path):
    kept = ("--memory", "--cache-dir", tmp_path / "cache")
    shards = ranks(2, "pt", "--shards", built / "multi", *OPTIONS, "--out", tmp_path / "shards")
    rendered = ranks(2, "pt", "--render", built / "multi.json", *OPTIONS, *kept, "--out", tmp_path / "rendered")
    assert (shards.codes, rendered.codes) == ([0, 0], [0, 0]), shards.stderr + rendered.stderr
    assert rendered.keys == shards.keys
    assert_same_run(tmp_path / "shards", tmp_path / "rendered")


@pytest.mark.parametrize(
    ("options", "code", "noun"),
    [
        ("--shards URL --cache-size 50kB --cache-dir new", 2, "--cache-size"),
        ("--render points.json --fresh", 2, "fractaldb"),
        ("--render single.json --memory --memory-size 1kB", 2, "1 kB"),
        ("--render single/recipe.json", 1, "recipe.json"),
        ("--render older.json", 1, "older.json"),
        ("--render changed.json", 1, "changed.json"),
    ],
)
def test_data_that_cannot_be_trained_on_is_one_line(options, code, noun, fractaltrain, built, dataset, web, elsewhere):
    for name in ("single", "single.json"):
        Path(name).symlink_to(built / name)
    recipe = json.loads(Path("single.json").read_text())
    Path("older.json").write_text(json.dumps({**recipe, "recipe": {**recipe["recipe"], "version": 2}}))
    Path("changed.json").write_text(json.dumps({**recipe, "systems": recipe["systems"][::-1]}))
    points = ("--kind", "fractaldb", "--n", 20, "--classes", 5, "--set", "draw=point-gray", "--out", "points.json")
    assert fractalgen("recipe", *points).exit_code == 0
    words = [web(dataset).url if word == "URL" else word for word in options.split()]
    fractaltrain("pt", *words, *OPTIONS, "--out", "new").assert_refused(code, noun)
    assert not Path("new").exists()


# Remote shards


def test_remote_run_with_a_small_cache_equals_a_local_run(fractaltrain, dataset, tmp_path, web, monkeypatch):
    server = web(dataset.parent)
    size = sum(sorted((dataset / name).stat().st_size for name in NAMES)[-2:])
    url = f"{server.url}/{dataset.name}?token=secret"
    cache = ("--shards", url, "--cache-dir", tmp_path / "cache", "--cache-size", size, "--workers", 1)

    def train(name: str, *options: object) -> str:
        done = fractaltrain("pt", *options, *OPTIONS, "--window", 1, "--out", tmp_path / name)
        assert done.code == 0, done.err
        return done.out + done.err

    train("local", "--shards", dataset)
    assert "secret" not in train("run", *cache)
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name == load_manifest(dataset).content_digest()
    assert sum(path.stat().st_size for path in folder.glob("*.tar")) <= size
    assert sum(server.count(name) for name in NAMES) > 4
    monkeypatch.delattr("fractaltrain.pretrain.prefetching")  # what is in memory needs no shards
    train("kept", *cache, "--memory")
    for name in ("run", "kept"):
        assert_same_run(tmp_path / name, tmp_path / "local")
        assert (tmp_path / name / "run.json").read_text() == (tmp_path / "local" / "run.json").read_text()


@pytest.mark.slow
def test_ranks_and_workers_fetch_every_shard_once(ranks, dataset, tmp_path, web):
    server = web(dataset.parent)
    cache = ("--cache-dir", tmp_path / "cache", "--workers", 2)
    ended = ranks(2, "pt", "--shards", f"{server.url}/{dataset.name}", "--out", tmp_path / "run", *OPTIONS, *cache)
    assert ended.codes == [0, 0], ended.stderr
    assert [server.count(name) for name in NAMES] == [1] * 4
    orders = [epoch_order([20, 13, 17], seed=0, epoch=epoch, window=2) for epoch in range(2)]
    assert ended.trained_on() == [index for order in orders for index in order[:50].tolist()]


def test_remote_lost_during_an_epoch_is_one_line(fractaltrain, dataset, tmp_path, web):
    server = web(dataset.parent)
    last = shard_windows(3, 0, 0, 1)[-1].item()
    server.faults[TRAIN[last]] = ["503", "forever"]
    url, cache = f"{server.url}/{dataset.name}", ("--cache-dir", tmp_path / "cache", "--workers", 1)
    arguments = ("pt", "--shards", url, "--out", tmp_path / "run", *OPTIONS, "--window", 1, *cache)
    outcome = fractaltrain(*arguments)
    *notes, error = outcome.err.splitlines()
    assert all(line.startswith(("note: ", "preparing the cache: ")) for line in notes), outcome.err
    assert (outcome.code, error.startswith(f"error: {url}/{TRAIN[last]}: ")) == (1, True)
    server.faults.clear()
    assert fractaltrain(*arguments).code == 0
