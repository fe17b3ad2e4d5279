"""What can be pre-trained on: folders of others, and packed images of several sizes."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fractalshards.cli import main as fractalshards
from fractalshards.errors import FractalError
from fractaltrain.data.images import DataChoice, open_data
from fractaltrain.data.shards import open_dataset
from fractaltrain.data.source import Source
from fractaltrain.distributed import World
from fractaltrain.log import read_metrics
from fractaltrain.recipes import PT_RECIPES
from fractaltrain.recipes.recipe import change
from fractaltrain.stream.loader import Batches, Loading, iterate
from fractaltrain.transforms import training_geometry

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, local_size=1, device=CPU)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_foreign(folder: Path, image_file: Callable[..., bytes], splits: dict[str, list[int]], **more: object) -> Path:
    """Tars as others write them: PNG and JPEG of several sizes, json beside the cls, pax headers, long names."""
    folder.mkdir()
    described = {}
    for split, lengths in splits.items():
        names = [f"in-{split}-{number:03d}.tar" for number in range(len(lengths))]
        for name, length in zip(names, lengths, strict=True):
            with tarfile.open(folder / name, "w", format=tarfile.PAX_FORMAT) as tar:
                for number in range(length):
                    form = ("PNG", "JPEG")[number % 2]
                    picture = image_file(form, 40 + number, 33, number)
                    files = {form.lower().replace("jpeg", "jpg"): picture, "cls": b"%d" % (number % 4), "json": b"{}"}
                    for extension, data in files.items():
                        member = tarfile.TarInfo(f"./{split}/{number:05d}.{extension}")
                        member.size, member.mtime = len(data), 1.25
                        tar.addfile(member, io.BytesIO(data))
        described[split] = {
            "name": split, "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths
        }  # fmt: skip
    (folder / "_info.json").write_text(json.dumps({"splits": described, **more}))
    return folder


def epoch(source: Source, crop: str, workers: int) -> list[tuple[str, int, bytes]]:
    transform = training_geometry(change(PT_RECIPES["anderson"], {"crop": crop}), 24, CPU)
    order = np.arange(sum(source.lengths))
    batches = Batches(source, transform, order[: len(order) // 4 * 4].reshape(-1, 4), order, 0, 0)
    return [
        (key, int(label), image.numpy().tobytes())
        for batch in iterate(batches, 0, Loading(workers, pin_memory=False))
        for key, label, image in zip(batch.keys, batch.labels, batch.images, strict=True)
    ]


@pytest.mark.parametrize("crop", ["none", "random", "resized"])
def test_a_foreign_folder_is_streamed_like_ours(tmp_path, image_file, crop):
    folder = write_foreign(tmp_path / "foreign", image_file, {"train": [5, 7], "validation": [3]})
    dataset = open_dataset(folder, ALONE)
    assert dataset.training.lengths == (5, 7)
    assert dataset.held_out is not None
    assert dataset.held_out.lengths == (3,)
    assert (dataset.classes, dataset.image_size) == (4, None)
    seen = epoch(dataset.training, crop, workers=0)
    assert [key for key, *_ in seen] == [f"train/{number:05d}" for number in (*range(5), *range(7))]
    assert [label for _, label, _ in seen] == [n % 4 for n in (*range(5), *range(7))]
    assert epoch(dataset.training, crop, workers=2) == seen


def test_pixels_of_a_foreign_sample(tmp_path, image_file):
    folder = write_foreign(tmp_path / "foreign", image_file, {"train": [4]})
    source = open_dataset(folder, ALONE).training
    for number in range(4):
        with Image.open(io.BytesIO(image_file(("PNG", "JPEG")[number % 2], 40 + number, 33, number))) as picture:
            assert np.array_equal(source.read(number).image, np.asarray(picture.convert("RGB")))


def test_classes_of_a_foreign_folder(tmp_path, image_file):
    assert open_dataset(write_foreign(tmp_path / "a", image_file, {"train": [4]}, num_classes=9), ALONE).classes == 9
    with pytest.raises(FractalError, match=r"b: labels reach 3, which does not fit 3 classes"):
        open_dataset(write_foreign(tmp_path / "b", image_file, {"train": [4]}, num_classes=3), ALONE)
    with pytest.raises(FractalError, match=r"c: no split 'train' to train on; it has test"):
        open_dataset(write_foreign(tmp_path / "c", image_file, {"test": [4]}), ALONE)
    with pytest.raises(FractalError, match=r"d: labels reach -1, which does not fit 0 classes"):
        open_dataset(write_foreign(tmp_path / "d", image_file, {"train": []}), ALONE)


def test_a_damaged_foreign_image_is_named(tmp_path, image_file):
    folder = write_foreign(tmp_path / "foreign", image_file, {"train": [4]})
    source = open_dataset(folder, ALONE).training
    data = bytearray((folder / "in-train-000.tar").read_bytes())
    data[data.index(b"IDAT") + 8 : data.index(b"IEND")] = bytes(data.index(b"IEND") - data.index(b"IDAT") - 8)
    (folder / "in-train-000.tar").write_bytes(data)
    with pytest.raises(FractalError, match=r"in-train-000\.tar: train/00000: image cannot be decoded.*fetch"):
        source.read(0)


def test_a_damaged_foreign_tar_brings_both_processes_down(world, tmp_path, image_file):
    """The first one scans, while the other waits."""
    folder = write_foreign(tmp_path / "foreign", image_file, {"train": [9, 8]})
    (folder / "in-train-001.tar").write_bytes(b"no tar" * 1000)
    ended = world(2, "pt", "--shards", folder, "--model", "test_resnet", "--batch-size", 4, "--out", tmp_path / "run")
    assert ended.codes[0] == 1
    assert 0 not in ended.codes
    assert ended.seconds < 30
    assert (ended.err[0].count("\n"), ended.err[1]) == (1, "")
    assert ended.err[0].startswith(f"error: {folder / 'in-train-001.tar'}: ")


def test_pre_training_on_a_foreign_folder_and_again(tmp_path, image_file, fractaltrain):
    folder = write_foreign(tmp_path / "foreign", image_file, {"train": [9, 8], "validation": [3]})
    before = sorted(folder.iterdir())
    command = ("pt", "--shards", folder, "--out", tmp_path / "run", "--model", "test_resnet", "--batch-size", 4)
    augmented = ("--image-size", 32, "--set", "crop=resized", "--set", "repeats=3", "--set", "mixup=0.8")
    done = fractaltrain(*command, *augmented, "--epochs", 1)
    assert (done.code, done.out.count("error")) == (0, 0), done.err
    (last,) = (line for line in read_metrics(tmp_path / "run") if line["split"] == "epoch")
    assert (last["step"], last["samples"]) == (3, 3)  # floor(17 / 3) samples three times, in batches of 4
    assert sorted(folder.iterdir()) == before
    assert fractaltrain(*command, *augmented, "--epochs", 1).code == 0


def test_packed_images_of_several_sizes(tmp_path, image_folder, capfd):
    folder = image_folder(tmp_path / "images", {"cat": 6, "dog": 6})
    with pytest.raises(SystemExit) as end:
        fractalshards(["pack", f"imagefolder:{folder}", str(tmp_path / "packed")])
    assert not end.value.code, capfd.readouterr().err
    dataset = open_dataset(tmp_path / "packed", ALONE)
    assert (dataset.classes, dataset.image_size) == (2, None)
    source = dataset.training
    assert len({source.read(index).image.shape for index in range(sum(source.lengths))}) > 3
    for crop in ("none", "random", "resized"):
        seen = epoch(source, crop, workers=0)
        assert all(len(pixels) == 24 * 24 * 3 for _, _, pixels in seen)
        assert len(seen) == 12


def test_finetuning_on_a_folder_of_others(tmp_path: Path, image_file: Callable[..., bytes]) -> None:
    folder = write_foreign(tmp_path / "foreign", image_file, {"train": [9, 8], "validation": [6]})
    data = open_data(DataChoice(f"shards:{folder}", 2, 0, Path("unused")), ALONE)
    labels = [data.training.read(index).label for index in range(sum(data.training.lengths))]
    assert sorted(labels) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert data.held_out.lengths == (6,)
