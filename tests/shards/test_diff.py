"""``fractalshards diff``: datasets that are equal, sharded or encoded differently, permuted, different, damaged."""

import shutil
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from damages import edit_split, overwrite
from fractalshards.diff import MAX_READ
from fractalshards.manifest import INFO, DatasetInfo, load_manifest, sample_key
from fractalshards.png import encode_png
from packing import Samples, assert_refused, good, run, write_dataset

pytestmark = pytest.mark.usefixtures("threads")
CLASSES = 3


def images(count: int, seed: int = 0) -> Samples:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [(sample_key(index), (pixels[index], index % CLASSES)) for index in range(count)]


def build(
    folder: Path, train: Samples, lengths: Sequence[int], val: Samples | None = None, level: int = 1, **recipe: Any
) -> Path:
    """Write a dataset with train shards of these lengths; ``level`` changes bytes, not pixels."""
    ends = np.cumsum(lengths).tolist()
    splits = {"train": [train[end - length : end] for end, length in zip(ends, lengths, strict=True)]}
    encode = partial(encode_png, compress=lambda rows: zlib.compress(rows.tobytes(), level))
    splits |= {"val": [val]} if val else {}
    return write_dataset(folder, splits, DatasetInfo(recipe, "single", CLASSES), 8, encode)


def differences(first: Path, second: Path) -> list[str]:
    result = run("diff", first, second, "--workers", 1)
    assert result.exit_code == 1, result.output
    return result.stdout.splitlines()


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Twenty samples in two shards, and five for validation."""
    return build(tmp_path / "A", images(25)[:20], (10, 10), images(25)[20:], n=20)


def test_equal_datasets_are_not_read(whole, tmp_path):
    (tmp_path / "B").mkdir()
    shutil.copy(whole / INFO, tmp_path / "B" / INFO)
    result = good("diff", whole, tmp_path / "B", "--workers", 1)
    assert result.stderr == ""
    assert result.stdout.splitlines()[:2] == ["train: the same 20 samples", "val: the same 5 samples"]


@pytest.mark.parametrize(("lengths", "level", "remark"), [((10, 10), 9, "2 shards"), ((7, 7, 6), 1, "3 shards")])
def test_same_samples_in_other_bytes_or_shards(whole, tmp_path, lengths, level, remark):
    hostile = "\x1b[2J\n" * 1000
    other = build(tmp_path / "B", images(25)[:20], lengths, images(25)[20:], level, n=hostile)
    recipe, train, _, _ = good("diff", whole, other, "--workers", 1).stdout.splitlines()
    assert recipe.startswith(f"recipe: n is 20 in {whole}")
    assert (recipe.isprintable(), len(recipe) < 400) == (True, True)
    assert train.startswith("train: the same 20 samples")
    assert remark in train


def test_equal_samples_with_different_digests_are_suspicious(whole, tmp_path):
    samples = images(25)[:20]
    permuted = build(tmp_path / "B", [*samples[:10], *samples[:9:-1]], (10, 10), images(25)[20:], n=20)
    damaged = shutil.copytree(whole, tmp_path / "C")
    edit_split(damaged, content_digests=[load_manifest(whole).splits["train"][0].content_digest, "0" * 32])
    for other in (permuted, damaged):
        assert "content digests of 1 shard differ, but the samples are the same" in differences(whole, other)[0]


def test_different_samples_are_named_with_image_or_label(whole, tmp_path):
    samples, others = images(25), images(25, seed=1)
    samples[11] = samples[11][0], (samples[11][1][0], 0)
    samples[13:20] = others[13:20]
    assert differences(whole, build(tmp_path / "B", samples[:20], (10, 10), samples[20:], n=20))[:2] == [
        "train: train-000001.tar: 8 samples not the same: 000000011 (label), 000000013 (image), 000000014 (image), "
        "000000015 (image), 000000016 (image), and 3 more",
        "val: the same 5 samples",
    ]


def test_missing_samples_are_named_on_either_side(whole, tmp_path):
    samples = images(25)
    del samples[3]
    other = build(tmp_path / "B", samples[:19], (10, 9), samples[19:], n=20)
    expected = [f"train: train-000000.tar: 1 sample not in {other}: 000000003", "val: the same 5 samples"]
    assert differences(whole, other)[:2] == differences(other, whole)[:2] == expected


def test_longer_datasets_and_extra_splits_are_named(whole, tmp_path):
    other = build(tmp_path / "B", images(20), (10,), n=10)
    assert differences(other, whole)[:3] == [
        f"recipe: n is 10 in {other}, 20 in {whole}",
        f"train: 10 samples more in {whole}, from train-000001.tar on",
        f"val: only in {whole}, 5 samples",
    ]


def test_only_the_first_different_shards_are_read(tmp_path):
    count = MAX_READ + 3
    first = build(tmp_path / "A", images(count), [1] * count, seed=0)
    second = build(tmp_path / "B", images(count, seed=1), [1] * count, seed=1)
    lines = differences(first, second)
    assert sum("not the same: " in line for line in lines) == MAX_READ
    assert "3 more shards" in lines[-2]


def test_damaged_and_missing_datasets_are_refused(whole, tmp_path):
    assert_refused(run("diff", whole, tmp_path / "none"), 1, "none")
    other = build(tmp_path / "B", images(20, seed=1), (10, 10), n=20)
    overwrite(other / "train-000000.tar", 512 + 16, bytes(40))
    assert_refused(run("diff", whole, other, "--workers", 1), 1, f"{other / 'train-000000.tar'}: 000000000")
