"""Published datasets: every entry of the table is one that torchvision takes, and files of each format are read."""

import gzip
import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from scipy.io import savemat

from fractalshards.errors import BadSampleError, FractalError
from fractaltrain.config import ImagesConfig
from fractaltrain.data.images import PUBLISHED, load_published, open_data
from tiny_training import ALONE

FLAT = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Fail where torchvision would download."""

    def refuse(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", refuse)


@pytest.mark.parametrize("name", PUBLISHED)
def test_entry_is_one_that_torchvision_takes(name, tmp_path):
    """Arguments that it does not take are a TypeError or ValueError; missing files are another error."""
    entry = PUBLISHED[name]
    for split in (entry.train, entry.val or {}):
        with pytest.raises((RuntimeError, FileNotFoundError)):
            getattr(torchvision.datasets, entry.torchvision)(tmp_path, **split)


@pytest.mark.parametrize("name", PUBLISHED)
def test_missing_files_without_internet_are_one_line(name, tmp_path):
    with pytest.raises(FractalError, match=rf"{name}.*--data-dir") as error:
        load_published(name, tmp_path)
    assert "\n" not in str(error.value)


def picture(seed: int, grey: bool = False) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 20) if grey else (24, 20, 3), np.uint8)
    return Image.fromarray(pixels)


def write_idx(folder: Path, dataset: type) -> np.ndarray:
    """Write the four original files of a dataset of MNIST's format into one folder; return the training images."""
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
    for file, _ in dataset.resources:
        part = images if file.startswith("train") else images[:20]
        labels = np.arange(len(part), dtype=np.uint8) % 10
        data = (struct.pack(">4i", 2051, *part.shape) + part.tobytes()) if "images" in file else (
            struct.pack(">2i", 2049, len(part)) + labels.tobytes()
        )  # fmt: skip
        (folder / file).write_bytes(gzip.compress(data))
    return images


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist"])
def test_flat_folder_of_original_files_is_read(name, tmp_path):
    images = write_idx(tmp_path, getattr(torchvision.datasets, PUBLISHED[name].torchvision))
    train, val = load_published(name, tmp_path)
    assert (train.lengths, val.lengths, train.classes, len(train.class_names)) == ((30,), (20,), 10, 10)
    for index in (0, 29):
        key, image, label = train.read(index)
        assert (key, label) == (f"{name}/train/{index:06d}", index % 10)
        assert np.array_equal(image, np.repeat(images[index][..., None], 3, axis=2))
    few = open_data(ImagesConfig(name, 2, 0, tmp_path), ALONE)
    assert few.train.label_counts.tolist() == [2] * 10
    whole = (tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes()
    for damaged in (whole[:-9], whole[:400] + b"?" + whole[401:], gzip.compress(b"no images"), b""):
        (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(damaged)
        with pytest.raises(FractalError, match=f"{name}.*--data-dir"):
            load_published(name, tmp_path)


@pytest.mark.skipif(not FLAT.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_fashion_mnist_of_debian_is_read():
    train, val = load_published("fashion-mnist", FLAT)
    assert (train.label_counts.tolist(), val.label_counts.tolist()) == ([6000] * 10, [1000] * 10)
    assert train.class_names[9] == "Ankle boot"
    image, label = train.read(0)[1:]
    assert (image.shape, label) == ((28, 28, 3), 9)


def test_dataset_without_splits_is_divided(tmp_path):
    for label, name in enumerate(("Forest", "River")):
        folder = tmp_path / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for number in range(10):
            picture(10 * label + number, grey=number % 2 == 0).save(folder / f"{name}_{number}.jpg")
    splits = open_data(ImagesConfig("eurosat", None, 0, tmp_path), ALONE)
    assert (splits.train.lengths, splits.val.lengths) == ((16,), (4,))
    assert splits.train.class_names == ("Forest", "River")
    assert all(splits.train.read(index).image.shape == (24, 20, 3) for index in range(16))
    few = open_data(ImagesConfig("eurosat", 3, 1, tmp_path), ALONE)
    assert (few.train.lengths, few.val.lengths) == ((6,), (14,))


def test_image_lists_are_read_and_damaged_images_named(tmp_path):
    meta, images = tmp_path / "food-101" / "meta", tmp_path / "food-101" / "images"
    meta.mkdir(parents=True)
    names = {name: [f"{name}/{number}" for number in range(4)] for name in ("soup", "cake")}
    for name, paths in names.items():
        (images / name).mkdir(parents=True)
        for number, path in enumerate(paths):
            picture(number).save(images / f"{path}.jpg")
    (meta / "train.json").write_text(json.dumps({name: paths[:3] for name, paths in names.items()}))
    (meta / "test.json").write_text(json.dumps({name: paths[3:] for name, paths in names.items()}))
    train, val = load_published("food101", tmp_path)
    assert (train.class_names, train.labels.tolist(), val.labels.tolist()) == (
        ("cake", "soup"),
        [1] * 3 + [0] * 3,
        [1, 0],
    )
    (images / "soup" / "0.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(BadSampleError, match="food101/train/000000"):
        train.read(0)
    assert train.read(1).label == 1


def test_matlab_files_are_read(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 10), np.uint8)
    split_list = {}
    for split in ("train", "test"):
        file = tmp_path / f"{split}_32x32.mat"
        savemat(file, {"X": images, "y": np.arange(1, 11)[:, None]})  # 10 stands for the digit 0
        split_list[split] = [f"file://{tmp_path}/nowhere", file.name, hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", split_list)
    train, _ = load_published("svhn", tmp_path)
    assert train.labels.tolist() == [*range(1, 10), 0]
    assert (train.classes, train.class_names) == (10, ())
    assert np.array_equal(train.read(3).image, images[..., 3])


def test_dataset_without_images_of_a_class_is_refused(tmp_path, monkeypatch):
    dataset = torchvision.datasets.MNIST
    write_idx(tmp_path, dataset)
    monkeypatch.setattr(dataset, "classes", [*dataset.classes, "eleventh"])
    with pytest.raises(FractalError, match="class 10"):
        open_data(ImagesConfig("mnist", None, 0, tmp_path), ALONE)
