"""Other readers (webdataset, timm, Hugging Face datasets) see the same samples; snippets of shards/README.md run."""

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

Seen = dict[str, tuple[str, list[int]]]  # by key: digest of the pixels, classes

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
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset of every kind in ``shards``."""
    folder = tmp_path_factory.mktemp("workspace")
    for kind, options in KINDS.items():
        numbers = "--n 40 --val 10 --classes 5 --workers 1"
        command = [BIN / "fractalgen", "build", "--kind", kind, *numbers.split(), *options.split()]
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    return folder


def pixels_digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def read_ours(folder: Path, split: str) -> Seen:
    manifest = load_manifest(folder)
    seen = {}
    for shard in index_split(manifest, split):
        for sample in iterate_shard(shard):
            pixels, label = decode_sample(sample, manifest.classes)
            seen[sample.key] = (pixels_digest(pixels), list(classes_of(label)))
    assert len(seen) == SAMPLES[split]
    return seen


def snippet(heading: str) -> str:
    """The first block of code after a word in bold in the README."""
    found = re.search(rf"\*\*{heading}\..*?```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found
    return found[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", SAMPLES)
def test_webdataset_reads_the_same_samples(workspace: Path, kind: str, split: str) -> None:
    shards = sorted(map(str, (workspace / "shards" / kind).glob(f"{split}-*.tar")))
    theirs = []
    for sample in webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8"):
        labels = sample["json"]["labels"] if kind == "multi" else [sample["cls"]]
        theirs.append((sample["__key__"], (pixels_digest(sample["png"]), labels)))
    assert theirs == list(read_ours(workspace / "shards" / kind, split).items())


@pytest.mark.parametrize(
    ("kind", "options"),
    [("single", {}), ("fractaldb", {}), ("visualatom", {}), ("multi", {}), ("multi", {"target_key": "labels"})],
    ids=["single", "fractaldb", "visualatom", "multi by the manifest", "multi by name"],
)
@pytest.mark.parametrize("split", SAMPLES)
def test_timm_reads_the_same_samples(workspace: Path, kind: str, split: str, options: dict[str, str]) -> None:
    root = workspace / "shards" / kind
    dataset = create_dataset(f"wds/{kind}", root=str(root), split=split, **options)
    assert len(dataset) == SAMPLES[split]
    theirs = [(pixels_digest(np.asarray(image)), label if kind == "multi" else [label]) for image, label in dataset]
    assert theirs == list(read_ours(root, split).values())


@pytest.mark.slow
def test_hugging_face_datasets_reads_the_same_samples(workspace: Path) -> None:
    card = re.search(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)
    assert card
    (workspace / "carded").mkdir()
    for path in (workspace / "shards" / "single").iterdir():
        (workspace / "carded" / path.name).symlink_to(path)
    (workspace / "carded" / "README.md").write_text(card[1])
    environment = {**os.environ, "HF_HOME": str(workspace / "cache"), "HF_HUB_OFFLINE": "1"}
    program = snippet("Hugging Face datasets") + READ_WITH_DATASETS
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=workspace, env=environment, text=True, capture_output=True, timeout=200
    )
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


def test_readme_snippets_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
