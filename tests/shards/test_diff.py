"""``fractalshards diff``: whether two datasets hold the same samples, and where not."""

import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from fractalshards.cli import main
from fractalshards.diff import MAX_READ, align
from fractalshards.digest import mapping_digest
from fractalshards.manifest import INFO, Shard, read_record, sample_key, shard_name, write_manifest
from fractalshards.png import encode_png
from fractalshards.storage import write_json
from fractalshards.writer import Rendered, write_shard

CLASSES = 3


def images(count: int, seed: int = 0) -> list[tuple[str, Rendered]]:
    rng = np.random.default_rng(seed)
    return [
        (sample_key(index), (rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), index % CLASSES))
        for index in range(count)
    ]


def build(
    folder: Path, splits: Mapping[str, Sequence[Sequence[tuple[str, Rendered]]]], level: int = 1, **recipe: Any
) -> Path:
    """A dataset with these shards; ``level`` changes bytes, not pixels."""
    folder.mkdir()
    made = {
        split: [
            write_shard(
                folder,
                shard_name(split, number),
                CLASSES,
                samples,
                lambda image: encode_png(image, lambda rows: zlib.compress(rows.tobytes(), level)),
            ).shard()
            for number, samples in enumerate(shards)
        ]
        for split, shards in splits.items()
    }
    write_manifest(
        folder,
        made,
        recipe=recipe,
        recipe_digest=mapping_digest(recipe),
        label_type="single",
        classes=CLASSES,
        image_size=8,
    )
    return folder


def cut(samples: list[tuple[str, Rendered]], *lengths: int) -> list[list[tuple[str, Rendered]]]:
    ends = np.cumsum(lengths).tolist()
    return [samples[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def diff(first: Path, second: Path) -> Result:
    return CliRunner().invoke(main, ["diff", str(first), str(second), "--workers", "1"])


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Twenty samples in two shards, and five for validation."""
    samples = images(25)
    return build(tmp_path / "A", {"train": cut(samples, 10, 10), "val": [samples[20:]]}, n=20, shard_size=10)


def test_a_copy_is_the_same_and_its_images_are_not_even_read(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "B").mkdir()
    shutil.copy(whole / INFO, tmp_path / "B" / INFO)
    result = diff(whole, tmp_path / "B")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "train: the same 20 samples",
        "val: the same 5 samples",
        "same samples, as the manifests promise; 'fractalshards verify DIR' checks that the files keep to them",
    ]
    assert result.stderr == ""


def test_other_bytes_of_the_same_pixels_are_told(whole: Path, tmp_path: Path) -> None:
    samples = images(25)
    other = build(tmp_path / "B", {"train": cut(samples, 10, 10), "val": [samples[20:]]}, 9, n=20, shard_size=10)
    result = diff(whole, other)
    assert result.exit_code == 0
    assert "train: the same 20 samples; 2 shards of other bytes: another CPU, or other software, wrote them" in (
        result.stdout
    )


def test_other_shards_of_the_same_samples_are_the_same(whole: Path, tmp_path: Path) -> None:
    samples = images(25)
    other = build(tmp_path / "B", {"train": cut(samples, 7, 7, 6), "val": [samples[20:]]}, n=20, shard_size=7)
    result = diff(whole, other)
    assert result.exit_code == 0, result.output
    assert f"recipe: shard_size is 10 in {whole}, 7 in {other}" in result.stdout
    assert "train: the same 20 samples, in other shards: 2 and 3" in result.stdout


def test_differing_samples_are_named_with_what_differs(whole: Path, tmp_path: Path) -> None:
    samples = images(25)
    samples[11] = (samples[11][0], (samples[11][1][0], 0))
    for index in range(13, 20):
        samples[index] = (samples[index][0], images(25, seed=1)[index][1])
    other = build(tmp_path / "B", {"train": cut(samples, 10, 10), "val": [samples[20:]]}, n=20, shard_size=10)
    result = diff(whole, other)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "train: train-000001.tar: 8 samples not the same: 000000011 (label), 000000013 (image), 000000014 (image), "
        "000000015 (image), 000000016 (image) and 3 more",
        "val: the same 5 samples",
        "not the same samples, as the manifests promise; 'fractalshards verify DIR' checks that the files keep to them",
    ]
    assert "error" not in result.stderr


def test_missing_samples_are_named_on_either_side(whole: Path, tmp_path: Path) -> None:
    samples = images(25)
    del samples[3]
    other = build(tmp_path / "B", {"train": cut(samples, 10, 9), "val": [samples[19:]]}, n=20, shard_size=10)
    assert f"train: train-000000.tar: 1 sample not in {other}: 000000003" in diff(whole, other).stdout
    result = diff(other, whole)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[0] == f"train: train-000000.tar: 1 sample not in {other}: 000000003"
    assert result.stdout.splitlines()[1] == "val: the same 5 samples"


def test_a_longer_dataset_and_a_split_of_only_one(whole: Path, tmp_path: Path) -> None:
    other = build(tmp_path / "B", {"train": cut(images(20), 10)}, n=10, shard_size=10)
    result = diff(other, whole)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[:3] == [
        f"recipe: n is 10 in {other}, 20 in {whole}",
        f"train: 10 samples more in {whole}, from train-000001.tar on",
        f"val: only in {whole}, 5 samples",
    ]
    assert result.stderr == ""


def test_a_tar_that_was_altered_is_left_to_verify(whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "B"
    shutil.copytree(whole, other)
    at = read_record(other, "train-000000.tar", "single").offsets[1] - 512
    with (other / "train-000000.tar").open("r+b") as file:
        os.pwrite(file.fileno(), b"2", at)
    result = diff(whole, other)
    assert result.exit_code == 0
    assert "as the manifests promise; 'fractalshards verify DIR' checks" in result.stdout
    assert CliRunner().invoke(main, ["verify", str(other), "--workers", "1"]).exit_code == 1


def test_a_manifest_that_is_not_true_is_suspected(whole: Path, tmp_path: Path) -> None:
    other = tmp_path / "B"
    shutil.copytree(whole, other)
    info = json.loads((other / INFO).read_text())
    info["splits"]["train"]["content_digests"][1] = "0" * 32
    write_json(other / INFO, info)
    result = diff(whole, other)
    assert result.exit_code == 1
    assert "content digests of 1 shard differ, but the samples are the same" in result.stdout


def test_of_many_differing_shards_the_first_are_looked_into(tmp_path: Path) -> None:
    count = MAX_READ + 3
    first = build(tmp_path / "A", {"train": cut(images(count), *[1] * count)}, seed=0)
    second = build(tmp_path / "B", {"train": cut(images(count, seed=1), *[1] * count)}, seed=1)
    lines = diff(first, second).stdout.splitlines()
    assert lines[0] == f"recipe: seed is 0 in {first}, 1 in {second}"
    assert sum("not the same: " in line for line in lines) == MAX_READ
    assert lines[-2] == "train: content digests of 3 more shards differ; their samples were not looked at"


def test_failures_are_one_line(whole: Path, tmp_path: Path) -> None:
    missing = diff(whole, tmp_path / "none")
    assert (missing.exit_code, missing.stderr.count("\n")) == (1, 1)
    assert CliRunner().invoke(main, ["diff", str(whole)]).exit_code == 2
    other = build(tmp_path / "B", {"train": cut(images(20, seed=1), 10, 10)}, n=20)
    with (other / "train-000000.tar").open("r+b") as file:
        os.pwrite(file.fileno(), bytes(40), 512 + 16)
    result = diff(whole, other)
    assert result.exit_code == 1
    assert f"error: {other / 'train-000000.tar'}: 000000000: image cannot be decoded" in result.stderr


def test_hostile_recipes_stay_on_their_line(whole: Path, tmp_path: Path) -> None:
    samples = images(25)
    splits = {"train": cut(samples, 10, 10), "val": [samples[20:]]}
    other = build(tmp_path / "B", splits, n="\x1b[2J\n" * 1000, shard_size=10)
    lines = diff(whole, other).stdout.splitlines()
    assert len(lines) == 4
    assert "\x1b" not in lines[0]
    assert len(lines[0]) < 400


@pytest.mark.parametrize(
    ("first", "second", "unlike", "regrouped", "extra"),
    [
        ([], [], 0, [], (0, 0)),
        ([5, 5], [5, 5], 2, [], (0, 0)),
        ([5, 5], [5], 1, [], (1, 0)),
        ([5, 5], [10], 0, [(2, 1)], (0, 0)),
        ([5, 5, 4], [5, 3, 2, 4, 9, 9], 2, [(1, 2)], (0, 2)),
        ([4], [5, 5, 5], 1, [], (0, 2)),
        ([9, 1], [5, 6, 7], 0, [(2, 2)], (0, 1)),
        ([5, 0], [5], 0, [(2, 1)], (0, 0)),
        ([], [1], 0, [], (0, 1)),
    ],
)
def test_alignment(
    first: list[int], second: list[int], unlike: int, regrouped: list[tuple[int, int]], extra: tuple[int, int]
) -> None:
    rows = [
        [Shard(str(i), n, 0, "", str((side, i))) for i, n in enumerate(row)] for side, row in enumerate((first, second))
    ]
    found = align(*rows)
    assert (len(found.alike), len(found.unlike)) == (0, unlike)
    assert [(len(left), len(right)) for left, right in found.regrouped] == regrouped
    assert (len(found.extra[0]), len(found.extra[1])) == extra
    pairs = [*found.unlike, *found.regrouped, found.extra]
    for side, row in enumerate(rows):
        assert sorted(shard.name for pair in pairs for shard in pair[side]) == sorted(shard.name for shard in row)
