"""Other readers (webdataset, timm, Hugging Face datasets) see the same samples; snippets of shards/README.md run.

Scripts that call the commands get JSON, whole lines and two streams.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from timm.data import create_dataset

from fractalshards.manifest import load_manifest
from fractalshards.reader import decode_sample, index_split, iterate_shard
from fractalshards.sample import classes_of

BIN = Path(sys.executable).parent
README = Path(__file__).parents[2] / "shards" / "README.md"
KINDS = {  # and the options of their build
    "single": "--shard-size 15 --size 32",
    "fractaldb": "--shard-size 15 --size 32 --points 2000",
    "multi": "--shard-size 15 --size 32 --points 2000",
    "visualatom": "--shard-size 25 --size 64 --set processes=1 --set instances=40",
}
SAMPLES = {"train": 40, "val": 10}
BUILD = "fractalgen build --n 40 --val 10 --classes 5 --workers 1"

READ_WITH_DATASETS = """
import hashlib, json, sys
import numpy as np
seen = {}
for kind in ("single", "fractaldb", "multi", "visualatom"):
    for streaming in (True, False):
        files = {split: f"shards/{kind}/{split}-*.tar" for split in ("train", "val")}
        for split, samples in load_dataset("webdataset", data_files=files, streaming=streaming).items():
            seen[f"{kind} {split} {streaming}"] = [
                (
                    sample["__key__"],
                    hashlib.sha256(np.asarray(sample["png"].convert("RGB")).tobytes()).hexdigest(),
                    sample["json"]["labels"] if kind == "multi" else [sample["cls"]],
                )
                for sample in samples
            ]
for streaming in (True, False):
    folder = load_dataset("carded", streaming=streaming)
    seen[f"folder {streaming}"] = {split: [sample["cls"] for sample in folder[split]] for split in folder}
json.dump(seen, open("seen.json", "w"))
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with a dataset of every kind in ``shards``."""
    folder = tmp_path_factory.mktemp("workspace")
    for kind, options in KINDS.items():
        out, err = run(f"{BUILD} --kind {kind} {options}", folder)
        assert f"next: fractaltrain pt --shards shards/{kind}" in out
        assert ("rendering: 50 / 50 images" in err, "rendering" in out) == (True, False)
        assert not {"\r", "\x1b"} & set(out + err)
    return folder


def run(command, folder, code=0):
    program, *arguments = command.split()
    result = subprocess.run([BIN / program, *arguments], cwd=folder, text=True, capture_output=True, timeout=120)
    assert result.returncode == code, result.stderr
    return result.stdout, result.stderr


def pixels_digest(pixels):
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def read_ours(folder, split):
    """Return by key the digest of the pixels and the classes."""
    manifest = load_manifest(folder)
    seen = {}
    for shard in index_split(manifest, split):
        for sample in iterate_shard(shard):
            pixels, label = decode_sample(sample, manifest.classes)
            seen[sample.key] = (pixels_digest(pixels), list(classes_of(label)))
    assert len(seen) == SAMPLES[split]
    return seen


def snippet(heading):
    """The first block of code after a word in bold in the README."""
    found = re.search(rf"\*\*{heading}\..*?```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found
    return found[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SAMPLES)
def test_webdataset_reads_the_same_samples(workspace, kind, split):
    shards = sorted(map(str, (workspace / "shards" / kind).glob(f"{split}-*.tar")))
    theirs = []
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"):
        labels = sample["json"]["labels"] if kind == "multi" else [sample["cls"]]
        theirs.append((sample["__key__"], (pixels_digest(sample["png"]), labels)))
    assert theirs == list(read_ours(workspace / "shards" / kind, split).items())


@pytest.mark.parametrize(
    ("kind", "options"), [*((kind, {}) for kind in KINDS), ("multi", {"target_key": "labels"})], ids=str
)
@pytest.mark.parametrize("split", SAMPLES)
def test_timm_reads_the_same_samples(workspace, kind, split, options):
    root = workspace / "shards" / kind
    dataset = create_dataset(f"wds/{kind}", root=str(root), split=split, **options)
    assert len(dataset) == SAMPLES[split]
    theirs = [(pixels_digest(np.asarray(image)), label if kind == "multi" else [label]) for image, label in dataset]
    assert theirs == list(read_ours(root, split).values())


@pytest.mark.slow
def test_hugging_face_datasets_reads_the_same_samples(workspace):
    card = re.search(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)
    assert card
    (workspace / "carded").mkdir()
    for path in (workspace / "shards" / "single").iterdir():
        (workspace / "carded" / path.name).symlink_to(path)
    (workspace / "carded" / "README.md").write_text(card[1])
    environment = {**os.environ, "HF_HOME": str(workspace / "cache"), "HF_HUB_OFFLINE": "1"}
    program = snippet("Hugging Face datasets") + READ_WITH_DATASETS
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=workspace, env=environment, text=True, capture_output=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("000000000 (32, 32) ")
    assert len(result.stdout.splitlines()) == 40
    seen = json.loads((workspace / "seen.json").read_text())
    for kind in KINDS:
        for split in SAMPLES:
            ours = [[key, *rest] for key, rest in read_ours(workspace / "shards" / kind, split).items()]
            for streaming in (True, False):
                assert seen[f"{kind} {split} {streaming}"] == ours
    single = {split: read_ours(workspace / "shards" / "single", split) for split in SAMPLES}
    labels = {split: [classes[0] for _, classes in samples.values()] for split, samples in single.items()}
    assert seen["folder True"] == seen["folder False"] == labels


def test_readme_snippets_run(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    exec(snippet(r"open_dataset\*\*.*?"), {})
    facts, *lines = capsys.readouterr().out.splitlines()
    assert facts.startswith("40 5 single 32 single ")
    assert len(lines) == 40
    exec(snippet("webdataset"), {})
    assert len(lines := capsys.readouterr().out.splitlines()) == 40
    assert lines[0].startswith("(32, 32, 3) ")
    exec(snippet("timm"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 80
    expected = [classes for _, classes in read_ours(Path("shards/multi"), "train").values()]
    assert [json.loads(line.removeprefix("(32, 32) ")) for line in lines[40:]] == expected


def test_json_of_info_verify_and_diff(workspace):
    facts = json.loads(run("fractalshards info --json shards/single", workspace)[0])
    assert facts["splits"] == {"train": {"samples": 40, "shards": 3}, "val": {"samples": 10, "shards": 1}}
    assert (facts["recipe"]["kind"], facts["classes"], len(facts["content_digest"])) == ("single", 5, 32)
    assert json.loads(run("fractalshards verify --json shards/single", workspace)[0]) == {"sound": True, "problems": []}
    run("fractalshards push shards/single damaged --quiet", workspace)
    shard = workspace / "damaged" / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[3000] ^= 1
    shard.write_bytes(data)
    out, err = run("fractalshards verify --json --quiet damaged", workspace, code=1)
    found = json.loads(out)
    assert (found["sound"], {problem["file"] for problem in found["problems"]}) == (False, {"train-000001.tar"})
    assert (err.startswith("error: damaged: "), err.count("\n")) == (True, 1)
    assert json.loads(run("fractalshards diff --json --quiet shards/single damaged", workspace)[0])["same"]
    out, err = run(f"{BUILD} --kind single {KINDS['single']} --quiet --seed 1 --out other", workspace)
    assert out.startswith("other: 40 train, 10 val images in ")
    assert (out.count("\n"), err) == (1, "")  # no advice on what comes next
    found = json.loads(run("fractalshards diff --json --quiet shards/single other", workspace, code=1)[0])
    assert (found["same"], bool(found["findings"])) == (False, True)
