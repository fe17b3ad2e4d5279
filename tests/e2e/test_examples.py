"""The examples run, with smaller numbers in the constants at their top, also if killed; so does tools/gpu_check.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.utils.data import DataLoader

from fractalgen.cli import main as fractalgen
from fractaltrain import EpochSampler, ShardDataset
from run_example import load_example

ROOT = Path(__file__).parents[2]
RUN = ROOT / "tests" / "support" / "run_example.py"
DATASET = "--kind single --n 100 --val 18 --classes 4 --size 32 --points 2000 --shard-size 30"
SMALL = {"BATCH_SIZE": 16, "EPOCHS": 3, "WORKERS": 1}  # 6 steps per epoch
MODEL = {"MODEL": "test_efficientnet_ln"}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with ``shards/single`` and ``single.json``."""
    folder = tmp_path_factory.mktemp("made")
    build = f"build {DATASET} --workers 1 --out {folder}/shards/single"
    for command in (build, f"recipe {DATASET} --out {folder}/single.json"):
        assert CliRunner().invoke(fractalgen, command.split()).exit_code == 0
    return folder


@pytest.fixture
def new_folder(made, tmp_path):
    """Function that makes a working directory with the two."""

    def make(name):
        folder = tmp_path / name
        folder.mkdir()
        for path in made.iterdir():
            (folder / path.name).symlink_to(path)
        return folder

    return make


def run(folder, name, constants, *killed, launch):
    """Run an example in a folder; return what it prints."""
    command = [sys.executable, *launch, RUN, ROOT / "examples" / name, json.dumps(constants), *map(str, killed)]
    result = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=250)
    assert bool(result.returncode) == bool(killed), result.stderr
    return result.stdout


def weights(folder):
    """Return those of the last checkpoint."""
    (path,) = [*folder.glob("checkpoint.pt"), *folder.glob("checkpoints/last.ckpt")]
    state = torch.load(path, weights_only=True)
    return state["model"] if path.suffix == ".pt" else state["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "constants", "killed", "launch"),
    [
        ("plain_loop.py", {"SAVE_EVERY": 4}, 4, []),
        ("ddp.py", {}, 2, TORCHRUN),
        ("lightning_fit.py", {"SAVE_EVERY": 4}, 5, []),  # it saves twice each time
    ],
)
def test_killed_example_ends_with_the_same_weights(name, constants, killed, launch, new_folder):
    constants = SMALL | MODEL | constants
    undisturbed, stopped = new_folder("undisturbed"), new_folder("stopped")
    printed = run(undisturbed, name, constants, launch=launch)
    run(stopped, name, constants, killed, launch=launch)
    before = weights(stopped)
    rest = run(stopped, name, constants, launch=launch)
    expected, reached = weights(undisturbed), weights(stopped)
    assert all(torch.equal(reached[key], expected[key]) for key in expected)
    assert not all(torch.equal(before[key], expected[key]) for key in expected)
    if name != "lightning_fit.py":  # which prints other things
        assert printed.endswith(rest)


@pytest.fixture
def current_folder(new_folder, monkeypatch):
    monkeypatch.chdir(new_folder("current"))


def load(name, **constants):
    return load_example(ROOT / "examples" / name, SMALL | constants)


def test_dict_batches_train_on_rendered_images(current_folder, capsys):
    load("dict_batches.py", **MODEL | {"EPOCHS": 2}).main()
    assert re.findall(r"epoch (\d) loss \d", capsys.readouterr().out) == ["0", "1"]


def test_timm_loaders_read_the_folder(current_folder):
    example = load("timm_loaders.py")
    images, labels = next(iter(example.timm_loader()))
    assert (images.shape, images.dtype, labels.shape) == ((16, 3, 224, 224), torch.float32, (16,))
    data, stored = ShardDataset("shards/single"), ShardDataset("shards/single")
    seen = [labels.tolist() for _, labels in example.exact_loader(data, EpochSampler(data, 16))]
    assert seen == [[stored[index][1] for index in batch] for batch in EpochSampler(stored, 16)]


def test_loop_of_the_pages_runs(current_folder):
    pages = [(ROOT / page).read_text() for page in ("README.md", "docs/own-loop.md")]
    code, same = (re.findall(r"```python\n(from torch.*?)```", page, re.DOTALL)[0] for page in pages)
    assert code == same
    names = {}
    exec(code.replace("90", "2").replace("num_workers=8", "num_workers=1"), names)
    assert (names["epoch"], names["step"], names["images"].shape) == (1, 0, (64, 3, 32, 32))


def random_crop(image):
    left, top = torch.randint(9, (2,)).tolist()
    return torch.from_numpy(np.array(image.crop((left, top, left + 24, top + 24))))


def test_seeded_transform_of_the_page_resumes(current_folder):
    (code,) = re.findall(r"```python\n(import torch\n.*?)```", (ROOT / "docs/own-loop.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    data = ShardDataset("shards/single")
    seeded = names["SeededTransform"](data, random_crop)

    def train(workers, state=None):
        sampler = EpochSampler(data, 16)
        if state:
            sampler.load_state_dict(state)
        loader = DataLoader(seeded, batch_sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
        batches = []
        for epoch in range(sampler.epoch, 2):
            sampler.set_epoch(epoch)
            seeded.epoch.fill_(epoch)
            batches += [images for images, _ in loader]
        return batches

    expected = train(0)
    resumed = train(2, EpochSampler(data, 16).state_dict(5))
    assert len(resumed) == 1 + 6
    assert all(torch.equal(batch, same) for batch, same in zip(resumed, expected[5:], strict=True))
    seeded.epoch.fill_(0)
    first = seeded[0][0]
    seeded.epoch.fill_(1)
    assert not torch.equal(first, seeded[0][0])


def check_gpu(folder, *options):
    """Run it; return the exit code, its JSON and its page."""
    temporary = folder / "tmp"
    temporary.mkdir()
    command = [sys.executable, ROOT / "tools" / "gpu_check.py", "--device", "cpu", "--out", folder / "out", *options]
    environment = os.environ | {"TMPDIR": str(temporary), "XDG_CACHE_HOME": str(folder / "cache")}
    ended = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    assert list(temporary.glob("gpu-check-*")) == []
    texts = [(folder / "out" / f"gpu_check.{kind}").read_text() for kind in ("json", "md")]
    return ended.returncode, json.loads(texts[0]), texts[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_gpu_check_runs_everything_on_a_cpu(tmp_path):
    code, results, page = check_gpu(tmp_path, "--minutes", "19")
    assert {name: part["problem"] for name, part in results["parts"].items()} == dict.fromkeys(results["parts"], "")
    assert code == 0
    assert {"data", "tests", "speed", "study"} == {*results["parts"]}
    outcomes = [test["outcome"] for test in results["tests"]]
    assert {*outcomes} == {"passed", "skipped"}
    assert outcomes.count("passed") > 15
    assert {*results["speed"][0]["feeds"]} == {"shards", "rendered"}
    assert len(results["study"]) == 3
    assert all(run["result"] and run["images_per_s"] > 0 for run in results["study"])
    for noun in ("test_collectives", "test_resnet", "ft/digits-2-per-class-0--single--test_vit--seed0"):
        assert noun in page


def test_gpu_check_leaves_out_parts_that_do_not_fit(tmp_path):
    code, results, page = check_gpu(tmp_path, "--minutes", "0.27")
    assert code == 0
    assert {part["problem"].partition(":")[0] for part in results["parts"].values()} == {"not run"}
    assert page.count("not run") == len(results["parts"])
