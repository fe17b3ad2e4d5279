"""Datasets to train and evaluate on: digits, published ones, folders of images, packed images, WebDataset folders."""

import gzip
import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits as sklearn_digits

from fractalshards.errors import BadSampleError, FractalError
from fractaltrain.config import ImagesConfig
from fractaltrain.data.images import PUBLISHED, FolderSource, load_digits, open_data, open_published
from fractaltrain.data.shards import open_shards
from fractaltrain.data.source import SampleSource, Splits
from fractaltrain.log import read_metrics
from fractaltrain.recipes import PT_RECIPES
from fractaltrain.recipes.recipe import change
from fractaltrain.stream.loader import epoch_loader
from fractaltrain.transforms import train_transform
from packing import write_tar
from tiny_training import ALONE


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Fail where torchvision would download."""
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", Mock(side_effect=OSError("no network")))


def open_images(name: str, per_class: int | None = None, seed: int = 0, folder: Path = Path("unused")) -> Splits:
    return open_data(ImagesConfig(name, per_class, seed, folder), ALONE)


def keys(source: SampleSource) -> list[str]:
    return [source.read(index).key for index in range(sum(source.lengths))]


def labels(source: SampleSource) -> list[int]:
    return [source.read(index).label for index in range(sum(source.lengths))]


def test_digits_are_scikit_learns_images():
    source, original = load_digits(), sklearn_digits()
    assert (source.classes, source.images.shape, source.images.dtype) == (10, (1797, 8, 8, 3), np.uint8)
    assert np.abs(source.images[..., 1] / 255 * 16 - original.images).max() < 0.04
    assert np.array_equal(source.labels, original.target)


@pytest.mark.parametrize(
    ("per_class", "counts"), [(5, [5] * 10), (None, [142, 146, 142, 146, 145, 146, 145, 143, 139, 144])]
)
def test_digits_are_split_by_class(per_class, counts):
    digits = open_images("digits", per_class)
    assert np.bincount(labels(digits.train)).tolist() == counts
    assert sorted(keys(digits.train) + keys(digits.val)) == [f"digits/{index:06d}" for index in range(1797)]


def test_subset_is_a_function_of_its_seed():
    chosen = keys(open_images("digits", 5, seed=1).train)
    assert set(chosen) != set(keys(open_images("digits", 5, seed=2).train))
    assert hashlib.sha256(" ".join(chosen).encode()).hexdigest()[:16] == "fa8179bcd0fb27b3"
    with pytest.raises(FractalError, match=r"class 8 has 174 .*--per-class"):
        open_images("digits", 175)


# Published datasets


@pytest.mark.parametrize("name", PUBLISHED)
def test_missing_files_without_internet_are_one_line(name, tmp_path):
    """Arguments that torchvision does not take are a TypeError or ValueError; missing files are another error."""
    entry = PUBLISHED[name]
    for split in (entry.train, entry.val or {}):
        with pytest.raises((RuntimeError, FileNotFoundError)):
            getattr(torchvision.datasets, entry.torchvision)(tmp_path, **split)
    with pytest.raises(FractalError, match=rf"{name}.*--data-dir") as error:
        open_published(name, tmp_path)
    assert "\n" not in str(error.value)


def picture(seed: int, grey: bool = False) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 20) if grey else (24, 20, 3), np.uint8)
    return Image.fromarray(pixels)


def write_idx(folder: Path, dataset: type) -> np.ndarray:
    """Write the four original files of a dataset of MNIST's format into one folder; return the training images."""
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
    for file, _ in dataset.resources:
        part, magic = images if file.startswith("train") else images[:20], 2051
        if "labels" in file:
            part, magic = np.arange(len(part), dtype=np.uint8) % 10, 2049
        (folder / file).write_bytes(gzip.compress(np.array([magic, *part.shape], ">i4").tobytes() + part.tobytes()))
    return images


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist"])
def test_flat_folder_of_original_files_is_read(name, tmp_path):
    images = write_idx(tmp_path, getattr(torchvision.datasets, PUBLISHED[name].torchvision))
    train, val = open_published(name, tmp_path)
    assert (train.lengths, val.lengths, train.classes, len(train.class_names)) == ((30,), (20,), 10, 10)
    for index in (0, 29):
        key, image, label = train.read(index)
        assert (key, label) == (f"{name}/train/{index:06d}", index % 10)
        assert np.array_equal(image, np.repeat(images[index][..., None], 3, axis=2))
    few = open_images(name, 2, folder=tmp_path)
    assert few.train.label_counts.tolist() == [2] * 10
    whole = (tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes()
    for damaged in (whole[:-9], whole[:400] + b"?" + whole[401:], gzip.compress(b"no images"), b""):
        (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(damaged)
        with pytest.raises(FractalError, match=f"{name}.*--data-dir"):
            open_published(name, tmp_path)


class Touch:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


@pytest.mark.parametrize(("name", "key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar_is_unpickled_only_with_the_published_md5_sums(name, key, tmp_path, monkeypatch):
    cifar = getattr(torchvision.datasets, PUBLISHED[name].torchvision)
    files = [tmp_path / cifar.base_folder / file for file, _ in (*cifar.train_list, *cifar.test_list)]
    files.append(tmp_path / cifar.base_folder / cifar.meta["filename"])
    (tmp_path / cifar.base_folder).mkdir()
    for file in files:
        file.write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    with pytest.raises(FractalError, match="--data-dir"):
        open_published(name, tmp_path)
    assert not (tmp_path / "touched").exists()
    images = np.random.default_rng(0).integers(0, 256, (20, 3072), np.uint8)
    names = [f"class {index}" for index in range(10)]
    for file in files:
        file.write_bytes(pickle.dumps({"data": images, key: [*range(10)] * 2, cifar.meta["key"]: names}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    train, val = open_published(name, tmp_path)
    assert (train.lengths, val.lengths, val.class_names) == ((20 * len(cifar.train_list),), (20,), (*names,))
    example = val.read(19)
    assert (example.key, example.label) == (f"{name}/test/000019", 9)
    assert np.array_equal(example.image.transpose(2, 0, 1).ravel(), images[19])  # red, green, blue planes


def test_dataset_without_splits_is_divided(tmp_path):
    for label, name in enumerate(("Forest", "River")):
        folder = tmp_path / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for number in range(10):
            picture(10 * label + number, grey=number % 2 == 0).save(folder / f"{name}_{number}.jpg")
    splits = open_images("eurosat", folder=tmp_path)
    assert (splits.train.lengths, splits.val.lengths) == ((16,), (4,))
    assert splits.train.class_names == ("Forest", "River")
    assert all(splits.train.read(index).image.shape == (24, 20, 3) for index in range(16))
    few = open_images("eurosat", 3, 1, tmp_path)
    assert (few.train.lengths, few.val.lengths) == ((6,), (14,))


def test_image_lists_are_read_and_damaged_images_named(tmp_path):
    meta, images = tmp_path / "food-101" / "meta", tmp_path / "food-101" / "images"
    meta.mkdir(parents=True)
    for split, numbers in (("train", range(3)), ("test", range(3, 4))):
        names = {name: [f"{name}/{number}" for number in numbers] for name in ("soup", "cake")}
        (meta / f"{split}.json").write_text(json.dumps(names))
        for name, number in product(names, numbers):
            (images / name).mkdir(parents=True, exist_ok=True)
            picture(number).save(images / name / f"{number}.jpg")
    train, val = open_published("food101", tmp_path)
    assert (train.class_names, train.labels.tolist()) == (("cake", "soup"), [1] * 3 + [0] * 3)
    assert val.labels.tolist() == [1, 0]
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
    train, _ = open_published("svhn", tmp_path)
    assert train.labels.tolist() == [*range(1, 10), 0]
    assert (train.classes, train.class_names) == (10, ())
    assert np.array_equal(train.read(3).image, images[..., 3])


# Folders of images


def make_folders(path: Path, classes: dict[str, list[str]]) -> str:
    for split, names in classes.items():
        (path / split).mkdir()
        for number, name in enumerate(names):
            (path / split / name).mkdir()
            for index in range(3):
                image = Image.new("RGB", (10 + number, 7), (number, index, 0))
                image.save(path / split / name / f"{index}.png")
    return f"imagefolder:{path}"


def test_image_folders(tmp_path, monkeypatch):
    """Hidden files and folders are no images and classes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    make_folders(tmp_path, {"train": ["ant", "bee"], "val": ["ant", "bee"]})
    for folder in ("train/.ipynb_checkpoints", "train/ant/.thumbnails", "val/.AppleDouble", "val/@eaDir"):
        shutil.copytree(tmp_path / "train" / "bee", tmp_path / folder)
    (tmp_path / "train" / "lost+found").mkdir()
    (tmp_path / "val" / "bee" / "._0.png").write_bytes(b"no image")
    photos = open_images("imagefolder:~", per_class=2)
    assert sorted(labels(photos.train)) == [0, 0, 1, 1]
    assert photos.train.class_names == photos.val.class_names == ("ant", "bee")
    assert keys(photos.val) == [f"{name}/{index}.png" for name in ("ant", "bee") for index in range(3)]
    assert photos.val.read(4).image.shape == (7, 11, 3)
    assert photos.val.read(4).image[0, 0].tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("folders", "noun"),
    [
        ({}, "train: "),
        ({"train": ["ant"]}, "val: "),
        ({"train": ["ant", "bee"], "val": ["ant"]}, "class folders.*bee"),
        ({"train": [], "val": []}, "train: .*class folder"),
    ],
)
def test_image_folders_that_do_not_fit_are_refused(tmp_path, folders, noun):
    with pytest.raises(FractalError, match=noun):
        open_images(make_folders(tmp_path, folders))


def test_damaged_or_missing_image_is_named(tmp_path):
    train = open_images(make_folders(tmp_path, {"train": ["ant"], "val": ["ant"]})).train
    (tmp_path / "train" / "ant" / "1.png").write_bytes(b"no image")
    with pytest.raises(FractalError, match=r"ant/1\.png: "):
        train.read(1)
    (tmp_path / "train" / "ant" / "1.png").unlink()
    with pytest.raises(FractalError, match=rf"^{tmp_path}/train/ant/1\.png: "):
        train.read(1)


@pytest.mark.parametrize("split", ["train", "val"])
def test_image_folders_that_change_have_another_digest(tmp_path, monkeypatch, split):
    name = make_folders(tmp_path, {"train": ["ant", "bee"], "val": ["ant", "bee"]})
    ant, bee = tmp_path / split / "ant", tmp_path / split / "bee"
    digests = [open_images(name).digest, open_images(name).digest]
    (ant / "new.png").write_bytes((ant / "0.png").read_bytes())
    digests.append(open_images(name).digest)
    (ant / "0.png").write_bytes((ant / "0.png").read_bytes() + b"\0")
    digests.append(open_images(name).digest)
    (ant / "0.png").rename(bee / "new.png")
    digests.append(open_images(name).digest)
    assert digests[0] == digests[1] is not None
    assert len(set(digests)) == 4
    # there may be millions of files, on a file system that many share: eval looks at none
    monkeypatch.setattr(FolderSource, "describe", lambda self: pytest.fail("all files are looked at"))
    assert open_data(ImagesConfig(name, None, 0, tmp_path), ALONE, for_training=False).digest is None


# Tars of other programs


@pytest.fixture
def theirs(tmp_path, image_file) -> Callable[..., Path]:
    """Function that writes a folder as others do: PNG and JPEG of several sizes, json beside the cls, long names."""

    def write(splits: dict[str, list[int]], **info: int) -> Path:
        folder, described = tmp_path / "theirs", {}
        folder.mkdir()
        for split, lengths in splits.items():
            names = [f"in-{split}-{number:03d}.tar" for number in range(len(lengths))]
            for name, length in zip(names, lengths, strict=True):
                files = {}
                for number in range(length):
                    form, extension = (("PNG", "png"), ("JPEG", "jpg"))[number % 2]
                    key = f"./{split}/{number:05d}"
                    files[f"{key}.{extension}"] = image_file(form, 40 + number, 33, number)
                    files |= {f"{key}.cls": b"%d" % (number % 4), f"{key}.json": b"{}"}
                write_tar(folder / name, files)
            described[split] = {"num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
        (folder / "_info.json").write_text(json.dumps({"splits": described, **info}))
        return folder

    return write


def test_webdataset_folder_is_streamed(theirs, image_file):
    folder = theirs({"train": [5, 7], "validation": [3]})
    before = sorted(folder.iterdir())
    splits = open_shards(folder, ALONE)
    assert (splits.train.lengths, splits.val.lengths) == ((5, 7), (3,))
    assert (splits.train.classes, splits.image_size) == (4, None)
    transform = train_transform(change(PT_RECIPES["anderson"], {"crop": "resized"}), 24)
    order = np.arange(12)
    loading = splits.train, transform, order.reshape(-1, 4), order, 0, 0
    zero, two = (list(epoch_loader(*loading, workers=workers)) for workers in (0, 2))
    samples = [sample for batch in zero for sample in zip(batch.keys, batch.labels.tolist(), strict=True)]
    assert samples == [(f"train/{number:05d}", number % 4) for number in (*range(5), *range(7))]
    assert all(torch.equal(first.images, second.images) for first, second in zip(zero, two, strict=True))
    for number in range(4):
        with Image.open(io.BytesIO(image_file(("PNG", "JPEG")[number % 2], 40 + number, 33, number))) as picture:
            assert np.array_equal(splits.train.read(number).image, np.asarray(picture.convert("RGB")))
    assert sorted(folder.iterdir()) == before  # nothing is written there
    data = bytearray((folder / "in-train-000.tar").read_bytes())
    data[data.index(b"IDAT") + 8 : data.index(b"IEND")] = bytes(data.index(b"IEND") - data.index(b"IDAT") - 8)
    (folder / "in-train-000.tar").write_bytes(data)
    with pytest.raises(FractalError, match=r"in-train-000\.tar: train/00000: "):
        open_shards(folder, ALONE).train.read(0)


@pytest.mark.parametrize(
    ("splits", "info", "noun"),
    [
        ({"train": [4]}, {"num_classes": 3}, "3 classes"),
        ({"test": [4]}, {}, "'train'"),
        ({"train": []}, {}, r"\.tar"),
        ({"train": [4], "val": [0]}, {}, "no samples in val"),
    ],
)
def test_webdataset_folder_without_sound_classes_or_splits_is_refused(theirs, splits, info, noun):
    with pytest.raises(FractalError, match=noun):
        open_shards(theirs(splits, **info), ALONE)


def test_tars_without_an_info_file_and_with_labels_in_json(tmp_path, image_file, fractaltrain):
    """As img2dataset writes them; one sample has no label."""
    folder = tmp_path / "theirs"
    for shard in range(3):
        files = {}
        for number in range(8):
            meta = {"caption": "x"} | ({} if (shard, number) == (1, 2) else {"label": number % 2})
            key = f"{shard:05d}{number:04d}"
            files[f"{key}.jpg"], files[f"{key}.txt"] = image_file("JPEG", 20, 20, number), b"x"
            files[f"{key}.json"] = json.dumps(meta).encode()
        write_tar(folder / f"{shard:05d}.tar", files)
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    small = ("--model", "test_resnet", "--image-size", 32, "--batch-size", 5, "--epochs", 1, "--set", "lr=0.01")
    command = ("ft", "--weights", "none", "--data", f"shards:{folder}", "--out", tmp_path / "run", *small)
    labels, skip = ("--label-key", "label"), ("--on-bad-sample", "skip")
    for options, code, noun in (
        ((), 1, "--label-key"),
        (labels, 1, "000010002"),
        (("--split", "val=9*"), 2, "9*"),
        ((*labels, *skip), 1, "--split"),  # no split to evaluate on
    ):
        refused = fractaltrain(*command, *options)
        *_, error = refused.err.splitlines()
        assert (refused.code, error.startswith("error: "), noun in error) == (code, True, True)
    done = fractaltrain(*command, *labels, *skip, "--split", "val=00002.tar")
    assert (done.code, "1 bad sample" in done.err, "000010002" in done.err) == (0, True, True)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["samples"] == 8
    (tmp_path / "val").mkdir()
    (folder / "00002.tar").rename(tmp_path / "val" / "00002.tar")
    command = ("eval", "--weights", tmp_path / "run", "--data", f"shards:{tmp_path / 'val'}", *labels)
    assert "--split" in fractaltrain(*command).err
    assert "8 val images" in fractaltrain(*command, "--split", "val=*").out


def test_pretraining_on_a_webdataset_folder(tmp_path, theirs, fractaltrain):
    folder = theirs({"train": [9, 8], "validation": [3]}, num_classes=9)  # images of four
    changes = [word for change in ("crop=resized", "repeats=3", "mixup=0.8") for word in ("--set", change)]
    small = ("--model", "test_resnet", "--batch-size", 4, "--image-size", 32, "--epochs", 1)
    command = ("pt", "--shards", folder, "--out", tmp_path / "run", *small, *changes)
    assert [fractaltrain(*command).code for _ in range(2)] == [0, 0]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["settings"]["classes"] == 9
    (last,) = (line for line in read_metrics(tmp_path / "run") if line["split"] == "epoch")
    assert (last["step"], last["samples"]) == (3, 3)  # floor(17 / 3) samples three times, in batches of 4


def test_labels_and_counts_of_shards(dataset, tmp_path):
    """They come from headers and sidecars, and must agree."""
    source = open_shards(dataset, ALONE).train
    assert source.labels.tolist() == labels(source)
    assert source.label_counts.tolist() == np.bincount(labels(source)).tolist()
    copy = shutil.copytree(dataset, tmp_path / "copy")
    record = json.loads((copy / "train-000000.json").read_text())
    record["label_counts"][:2] = [5, 3]
    (copy / "train-000000.json").write_text(json.dumps(record))
    with pytest.raises(FractalError, match="labels"):
        _ = open_shards(copy, ALONE).train.labels
