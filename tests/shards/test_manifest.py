"""The manifest comes from outside: nothing in it is believed, every refusal is one line that names the file."""

import json
from pathlib import Path
from typing import Any

import pytest

from fractalshards.errors import FractalError
from fractalshards.manifest import INFO, load_manifest
from fractalshards.reader import index_split


def change(dataset: Path, **changes: Any) -> None:
    info = json.loads((dataset / INFO).read_text())
    for name, value in changes.items():
        split = info["splits"]["train"]
        (split if name in split else info)[name] = value
    (dataset / INFO).write_text(json.dumps(info))


def test_it_is_the_info_file_that_timm_reads(dataset: Path) -> None:
    split = json.loads((dataset / INFO).read_text())["splits"]["train"]
    assert split["name"] == "train"
    assert split["num_samples"] == 10
    assert split["filenames"] == ["train-000000.tar", "train-000001.tar"]
    assert split["shard_lengths"] == [5, 5]


def test_what_is_written_is_read(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    assert (manifest.classes, manifest.image_size, manifest.label_type) == (3, 16, "single")
    assert manifest.samples("train") == 10
    assert manifest.bytes() == sum(path.stat().st_size for path in dataset.glob("*.tar"))
    assert str(dataset) in manifest.summary()


def test_classes_may_have_names_and_images_several_sizes(dataset: Path) -> None:
    info = json.loads((dataset / INFO).read_text())
    info |= {"image_size": None, "class_names": ["cat", "dog", "fish"]}
    (dataset / INFO).write_text(json.dumps(info))
    manifest = load_manifest(dataset)
    assert (manifest.image_size, manifest.class_names, manifest.class_ids) == (None, ("cat", "dog", "fish"), ())


@pytest.mark.parametrize(
    "name",
    [
        "../train-000000.tar",
        "/etc/passwd",
        "a/b.tar",
        "pipe:rm -rf .",
        "s3://bucket/a.tar",
        "..",
        ".hidden",
        "",
        "a\nb",
    ],
)
def test_names_that_lead_elsewhere_are_refused(dataset: Path, name: str) -> None:
    change(dataset, filenames=[name, "train-000001.tar"])
    with pytest.raises(FractalError, match="not a plain file name"):
        load_manifest(dataset)


@pytest.mark.parametrize(
    "changes",
    [
        {"filenames": ["train-000000.tar", "train-000000.tar"]},
        {"shard_lengths": [5, -5]},
        {"shard_lengths": [5, 5.0]},
        {"shard_lengths": [5, True]},
        {"shard_lengths": [5]},
        {"num_samples": 11},
        {"sha256": [1, 2]},
        {"splits": []},
        {"recipe": "x"},
        {"classes": None},
        {"classes": 0},
        {"classes": 10**15},
        {"image_size": 0},
        {"class_names": ["one", "two"]},
        {"class_names": [1, 2, 3]},
        {"class_ids": "abc"},
        {"format_version": 99},
        {"label_type": "other"},
    ],
    ids=str,
)
def test_wrong_fields_are_refused_in_one_line(dataset: Path, changes: dict[str, Any]) -> None:
    change(dataset, **changes)
    with pytest.raises(FractalError) as caught:
        load_manifest(dataset)
    assert str(dataset / INFO) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_bombs_are_refused(dataset: Path) -> None:
    (dataset / INFO).write_text("[" * 100_000)
    with pytest.raises(FractalError, match="not valid JSON"):
        load_manifest(dataset)
    (dataset / INFO).write_bytes(b" " * (65 << 20))
    with pytest.raises(FractalError, match="larger than"):
        load_manifest(dataset)


def test_a_missing_folder_and_an_unfinished_one_say_what_to_do(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(FractalError, match="no such folder"):
        load_manifest(tmp_path / "nowhere")
    (dataset / INFO).unlink()
    with pytest.raises(FractalError, match="not a finished dataset"):
        load_manifest(dataset)


def test_indexing_checks_shards_against_the_manifest(dataset: Path) -> None:
    manifest = load_manifest(dataset)
    with pytest.raises(FractalError, match="no split 'val'; it has train"):
        index_split(manifest, "val")
    shard = dataset / "train-000001.tar"
    with shard.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(FractalError, match=r"train-000001.tar: 1000 bytes instead of"):
        index_split(manifest, "train")
    shard.unlink()
    with pytest.raises(FractalError, match=r"train-000001.tar: missing"):
        index_split(manifest, "train")
