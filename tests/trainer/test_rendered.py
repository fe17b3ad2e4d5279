"""Training on rendered samples, and on samples in memory, is training on the shards that hold them."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import pytest
import torch

from building import run as fractalgen
from fractalgen import executors
from fractalshards.manifest import load_manifest
from fractalshards.recipe_file import export_recipe
from fractaltrain.log import read_metrics
from tiny_training import assert_same_run, weights

OPTIONS = ("--model", "test_resnet", "--epochs", 2, "--batch-size", 10, "--window", 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a recipe of each kind, ``KIND.json``, and the shards that it describes."""
    folder = tmp_path_factory.mktemp("data")
    options = ["--n", "50", "--val", "10", "--classes", "5", "--size", "32", "--points", "500", "--shard-size", "20"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executors, "worker_pool", ThreadPoolExecutor)  # processes take a second to start
        for kind in ("single", "multi", "fractaldb"):
            file = folder / f"{kind}.json"
            for command in (("recipe", "--kind", kind, *options, "--out", file), ("build", "--recipe", file)):
                out = ("--out", folder / kind) if command[0] == "build" else ()
                result = fractalgen(*command, *out)
                assert result.exit_code == 0, result.output
    return folder


def curve(run: Path) -> list[tuple[object, ...]]:
    return [(line["global_step"], line.get("loss"), line.get("train_loss")) for line in read_metrics(run)]


@pytest.mark.parametrize("kind", ["single", "multi", "fractaldb"])
def test_losses_are_those_of_the_shards_bit_for_bit(kind, fractaltrain, data, tmp_path):
    memory = ("--memory", "--cache-dir", tmp_path / "cache")
    ways = {
        "shards": ("--shards", data / kind, "--workers", 0),
        "rendered": ("--render", data / f"{kind}.json", "--workers", 2),
        "rendered once": ("--render", data / f"{kind}.json", *memory),
        "decoded once": ("--shards", data / kind, *memory, "--workers", 1),
    }
    for name, options in islice(ways.items(), 4 if kind == "multi" else 2):
        outcome = fractaltrain("pt", *options, *OPTIONS, "--out", tmp_path / name)
        assert outcome.code == 0, outcome.err
        assert_same_run(tmp_path / name, tmp_path / "shards")
    assert not list((tmp_path / "cache").rglob("*.pixels"))


def test_built_recipe_continues_a_run_of_its_shards(fractaltrain, data, tmp_path):
    """The digest of a dataset that was built is in its recipe, so it is the same dataset."""
    (tmp_path / "single.json").write_bytes(export_recipe(load_manifest(data / "single")))
    options = (*OPTIONS, "--set", "passes=2")
    assert fractaltrain("pt", "--shards", data / "single", *options, "--out", tmp_path / "run").code == 0
    again = fractaltrain("pt", "--render", tmp_path / "single.json", *options, "--out", tmp_path / "run")
    assert again.code == 0
    assert "finished" in again.out
    other = fractaltrain("pt", "--render", data / "single.json", *options, "--out", tmp_path / "run")
    assert (other.code, "dataset_digest" in other.err) == (1, True)


def test_fresh_run_shows_other_images_after_the_first_epoch(fractaltrain, data, tmp_path):
    stored = fractaltrain("pt", "--render", data / "single.json", *OPTIONS, "--out", tmp_path / "stored")
    fresh = fractaltrain("pt", "--render", data / "single.json", "--fresh", *OPTIONS, "--out", tmp_path / "fresh")
    assert (stored.code, fresh.code) == (0, 0), stored.err + fresh.err
    one, other = curve(tmp_path / "stored"), curve(tmp_path / "fresh")
    assert one[:1] == other[:1]
    assert one[-1] != other[-1]
    again = fractaltrain("pt", "--render", data / "single.json", *OPTIONS, "--out", tmp_path / "fresh")
    assert (again.code, "fresh" in again.err) == (1, True)


def test_passes_make_one_epoch(fractaltrain, data, tmp_path):
    """Two epochs of two passes take the same samples as four of one, and learn the same."""
    once = fractaltrain("pt", "--shards", data / "single", *OPTIONS, "--epochs", 4, "--out", tmp_path / "once")
    twice = fractaltrain("pt", "--shards", data / "single", *OPTIONS, "--set", "passes=2", "--out", tmp_path / "twice")
    assert (once.code, twice.code) == (0, 0), once.err + twice.err
    losses, means = (
        [line["train_loss"] for line in read_metrics(tmp_path / run) if "train_loss" in line]
        for run in ("once", "twice")
    )
    assert means == pytest.approx([(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2])
    first, second = weights(tmp_path / "once"), weights(tmp_path / "twice")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("memory", [False, True])
def test_ranks_render_what_the_shards_hold(memory, ranks, data, tmp_path):
    kept = ("--memory", "--cache-dir", tmp_path / "cache") if memory else ()
    shards = ranks(2, "pt", "--shards", data / "multi", *OPTIONS, "--out", tmp_path / "shards")
    rendered = ranks(2, "pt", "--render", data / "multi.json", *OPTIONS, *kept, "--out", tmp_path / "rendered")
    assert (shards.codes, rendered.codes) == ([0, 0], [0, 0]), shards.stderr + rendered.stderr
    assert rendered.keys == shards.keys
    assert_same_run(tmp_path / "shards", tmp_path / "rendered")


@pytest.mark.parametrize(
    ("options", "code", "noun"),
    [
        ([], 2, "--render"),
        (["--shards", "single", "--render", "single.json"], 2, "--render"),
        (["--render", ""], 2, "--render"),
        (["--shards", "single", "--fresh"], 2, "--fresh"),
        (["--render", "single.json", "--fresh", "--memory"], 2, "--memory"),
        (["--render", "points.json", "--fresh"], 2, "fractaldb"),
        (["--render", "single.json", "--memory", "--memory-size", "1kB"], 2, "1 kB"),
        (["--render", "single.json", "--label-key", "x"], 2, "--label-key"),
        (["--render", "nowhere.json"], 1, "nowhere.json"),
        (["--render", "single/recipe.json"], 1, "recipe.json"),
        (["--render", "older.json"], 1, "older.json"),
        (["--render", "changed.json"], 1, "changed.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(options, code, noun, fractaltrain, data, tmp_path, monkeypatch):
    monkeypatch.chdir(data)
    recipe = json.loads(Path("single.json").read_text())
    Path("older.json").write_text(json.dumps({**recipe, "recipe": {**recipe["recipe"], "version": 2}}))
    Path("changed.json").write_text(json.dumps({**recipe, "systems": recipe["systems"][::-1]}))
    if not Path("points.json").exists():
        points = ("--kind", "fractaldb", "--n", 20, "--classes", 5, "--set", "draw=point-gray", "--out", "points.json")
        assert fractalgen("recipe", *points).exit_code == 0
    outcome = fractaltrain("pt", *options, *OPTIONS, "--out", tmp_path / "run")
    assert (outcome.code, outcome.out) == (code, ""), outcome.err
    assert outcome.err.count("\n") == 1
    assert noun in outcome.err
    assert not (tmp_path / "run").exists()
