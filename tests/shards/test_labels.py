"""Labels: what is written is read, and what comes from outside is not believed."""

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fractalshards.cli import main
from fractalshards.digest import mapping_digest, systems_digest
from fractalshards.errors import FractalError
from fractalshards.manifest import (
    RECIPE,
    SYSTEMS,
    finished_record,
    load_manifest,
    read_record,
    sample_key,
    write_manifest,
)
from fractalshards.reader import index_split, iterate_shard
from fractalshards.sample import MultiLabel, Object, classes_of, decode_label, encode_label
from fractalshards.storage import write_json
from fractalshards.systems import write_systems
from fractalshards.writer import write_shard

objects = st.builds(
    Object,
    label=st.integers(0, 99_999),
    bbox=st.tuples(st.integers(0, 999), st.integers(0, 999), st.integers(1, 999), st.integers(1, 999)),
)


multi_labels = st.lists(objects, min_size=1, max_size=9).map(lambda drawn: MultiLabel.of(tuple(drawn)))


@given(st.integers(0, 10**9 - 1) | multi_labels)
def test_what_is_encoded_is_decoded(label: int | MultiLabel) -> None:
    extension, text = encode_label(label)
    assert decode_label({"png": b"", extension: text}) == label
    assert extension == ("cls" if isinstance(label, int) else "json")


def test_the_json_is_what_the_format_says() -> None:
    label = MultiLabel.of((Object(7, (1, 2, 3, 4)), Object(2, (0, 0, 5, 5)), Object(7, (9, 9, 1, 1))))
    _, text = encode_label(label)
    assert json.loads(text) == {
        "labels": [2, 7],
        "objects": [
            {"class": 7, "bbox": [1, 2, 3, 4]},
            {"class": 2, "bbox": [0, 0, 5, 5]},
            {"class": 7, "bbox": [9, 9, 1, 1]},
        ],
    }
    assert classes_of(label) == (2, 7)
    assert classes_of(3) == (3,)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "expected a JSON object"),
        (b'{"labels":[1]}', "objects is missing"),
        (b'{"labels":[],"objects":[]}', "no object"),
        (b'{"labels":[1,2],"objects":[{"class":1,"bbox":[0,0,1,1]}]}', "not the classes of the objects"),
        (b'{"labels":[2,1],"objects":[{"class":1,"bbox":[0,0,1,1]},{"class":2,"bbox":[0,0,1,1]}]}', "sorted"),
        (b'{"labels":[-1],"objects":[{"class":-1,"bbox":[0,0,1,1]}]}', "not a count"),
        (b'{"labels":[1],"objects":[{"class":1,"bbox":[0,0,1]}]}', "bbox"),
        (b'{"labels":[1],"objects":[{"class":1,"bbox":[0,0,0,1]}]}', "bbox"),
        (b'{"labels":[1],"objects":[{"class":1,"bbox":[0,0.5,1,1]}]}', "not a count"),
        (b" " * ((1 << 20) + 1), "too long"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_json_that_is_no_label_is_refused(text: bytes, words: str) -> None:
    with pytest.raises(FractalError, match=words):
        decode_label({"json": text})


def test_a_sample_has_one_label() -> None:
    with pytest.raises(FractalError, match="expected one label"):
        decode_label({"png": b""})
    with pytest.raises(FractalError, match="expected one label"):
        decode_label({"cls": b"1", "json": b"{}"})


@pytest.fixture
def multi(tmp_path: Path) -> Path:
    """A multi-label dataset of six samples, three classes, 16 x 16 pixels."""
    folder = tmp_path / "multi"
    folder.mkdir()
    systems = [np.zeros((2, 2, 3))] * 3
    recipe = {"kind": "random", "n": 6, "systems_digest": systems_digest(systems)}
    write_systems(folder / SYSTEMS, systems)
    write_json(folder / RECIPE, {"recipe": recipe, "recipe_digest": mapping_digest(recipe)})
    rng = np.random.default_rng(0)
    samples = []
    for i in range(6):
        label = MultiLabel.of((Object(i % 3, (i, 0, 3, 4)), Object((i + 1) % 3, (1, 1, 15, 15))))
        samples.append((sample_key(i), (rng.integers(0, 256, (16, 16, 3), dtype=np.uint8), label)))
    record = write_shard(folder, "train-000000.tar", 3, samples)
    assert record.label_counts == (4, 4, 4)
    digest = mapping_digest(recipe)
    write_manifest(
        folder,
        {"train": [record.shard()]},
        recipe=recipe,
        recipe_digest=digest,
        label_type="multi",
        classes=3,
        image_size=16,
    )
    return folder


def rewrite(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "train-000000.tar"
    data = path.read_bytes()
    assert old in data
    assert len(old) == len(new)
    path.write_bytes(data.replace(old, new, 1))


def test_a_multi_label_dataset_is_described_verified_and_read_by_webdataset(multi: Path) -> None:
    manifest = load_manifest(multi)
    assert manifest.label_type == "multi"
    result = CliRunner().invoke(main, ["verify", str(multi), "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert "one or more per image" in CliRunner().invoke(main, ["info", str(multi)]).output
    (shard,) = index_split(manifest, "train")
    theirs = list(webdataset.WebDataset([str(shard.path)], shardshuffle=False).decode("rgb8"))
    for ours, other in zip(iterate_shard(shard), theirs, strict=True):
        label = decode_label(ours.files)
        assert isinstance(label, MultiLabel)
        assert tuple(other["json"]["labels"]) == label.labels
        assert [tuple(thing["bbox"]) for thing in other["json"]["objects"]] == [x.bbox for x in label.objects]


def test_boxes_that_leave_the_image_are_named(multi: Path) -> None:
    rewrite(multi, b'"bbox":[3,0,3,4]', b'"bbox":[3,0,3,9]')
    result = CliRunner().invoke(main, ["verify", str(multi), "--workers", "1"])
    assert "content digest differs" in result.output
    rewrite(multi, b'"bbox":[3,0,3,9]', b'"bbox":[9,0,9,9]')
    result = CliRunner().invoke(main, ["verify", str(multi), "--workers", "1"])
    assert "000000003: bbox [9, 0, 9, 9] leaves the image of 16 x 16" in result.output


def test_a_label_of_the_other_type_is_named(dataset: Path) -> None:
    info = json.loads((dataset / "_info.json").read_text())
    (dataset / "_info.json").write_text(json.dumps({**info, "label_type": "multi"}))
    result = CliRunner().invoke(main, ["verify", str(dataset), "--workers", "1"])
    assert "000000000: not a label of type 'multi'" in result.output


def test_counts_of_classes_must_be_those_of_the_label_type(multi: Path, dataset: Path) -> None:
    assert read_record(multi, "train-000000.tar", "multi").samples == 6
    assert finished_record(multi, "train-000000.tar", "single") is None
    sidecar = multi / "train-000000.json"
    fields = json.loads(sidecar.read_text())
    for counts in ([7, 4, 4], [1, 2, 2]):
        sidecar.write_text(json.dumps({**fields, "label_counts": counts}))
        assert finished_record(multi, "train-000000.tar", "multi") is None
    assert finished_record(dataset, "train-000000.tar", "multi") is not None


def test_a_sheet_puts_each_image_in_the_row_of_one_of_its_classes(multi: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    result = CliRunner().invoke(main, ["sheet", str(multi), "--out", str(out), "--per-class", "2", "--tile", "16"])
    assert result.exit_code == 0, result.output
    assert f"{44 + 2 * 20} x {3 * 20 + 4} pixels" in result.output
