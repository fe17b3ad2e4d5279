import hashlib
import io
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fractaltrain.data.cifar import DATASETS, load_cifar
from fractaltrain.data.digits import load_digits
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits

from fractalshards.errors import FractalError
from fractaltrain.data.images import DataChoice, open_data
from fractaltrain.data.source import ArraySource, Source, split_per_class
from fractaltrain.distributed import World

ALONE = World(rank=0, size=1, local_size=1, device=torch.device("cpu"))


def keys(source: Source) -> list[str]:
    return [source.read(index).key for index in range(sum(source.lengths))]


def labels(source: Source) -> list[int]:
    return [source.read(index).label for index in range(sum(source.lengths))]


def digits(per_class: int | None, seed: int = 0) -> tuple[Source, Source]:
    data = open_data(DataChoice("digits", per_class, seed, Path("unused")), ALONE)
    return data.training, data.held_out


def test_digits_are_scikit_learns_images():
    source, original = load_digits(), sklearn_digits()
    assert (source.classes, source.images.shape, source.images.dtype) == (10, (1797, 8, 8, 3), np.uint8)
    assert np.abs(source.images[..., 1] / 255 * 16 - original.images).max() < 0.04
    assert np.array_equal(source.labels, original.target)


@pytest.mark.parametrize("per_class", [5, 10])
def test_few_digits_for_training_and_all_others_held_out(per_class):
    train, held_out = digits(per_class)
    assert np.bincount(labels(train)).tolist() == [per_class] * 10
    assert sorted(keys(train) + keys(held_out)) == [f"digits/{index:06d}" for index in range(1797)]


def test_digits_without_a_number_are_split_four_to_one_in_every_class():
    train, held_out = digits(None)
    shares = np.bincount(labels(train)) / np.bincount(sklearn_digits().target)
    assert np.allclose(shares, 0.8, atol=0.003)
    assert sorted(keys(train) + keys(held_out)) == [f"digits/{index:06d}" for index in range(1797)]


def test_subset_seed_chooses_other_digits_and_always_the_same():
    assert keys(digits(5, seed=1)[0]) == keys(digits(5, seed=1)[0])
    assert set(keys(digits(5, seed=1)[0])) != set(keys(digits(5, seed=2)[0]))
    assert hashlib.sha256(" ".join(keys(digits(5, seed=1)[0])).encode()).hexdigest()[:16] == "fa8179bcd0fb27b3"


def test_more_per_class_than_there_are():
    source = ArraySource("few", np.zeros((5, 8, 8, 3), np.uint8), np.array([0, 0, 0, 1, 1]), classes=2)
    with pytest.raises(FractalError, match="class 1 has 2 training samples, not 3; lower --per-class"):
        split_per_class(source, 3, seed=0)


def cifar_images(count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 3072), np.uint8), [index % 10 for index in range(count)]


def make_archive(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple]:
    """Write an archive as CIFAR's authors do, and teach torchvision its checksums instead of the published ones."""
    kind = DATASETS[name]
    label_key = "labels" if name == "cifar10" else "fine_labels"
    parts, sums = {}, {}
    with tarfile.open(folder / kind.filename, "w:gz") as archive:

        def add(file: str, content: dict) -> None:
            data = pickle.dumps(content, protocol=2)
            sums[file] = hashlib.md5(data).hexdigest()
            member = tarfile.TarInfo(f"{kind.base_folder}/{file}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

        for number, (file, _) in enumerate(kind.train_list + kind.test_list):
            images, targets = cifar_images(20, seed=number)
            parts[file] = (images, targets)
            add(file, {"data": images, label_key: targets})
        add(kind.meta["filename"], {kind.meta["key"]: [f"class {index}" for index in range(10)]})
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5((folder / kind.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(kind, "train_list", [[file, sums[file]] for file, _ in kind.train_list])
    monkeypatch.setattr(kind, "test_list", [[file, sums[file]] for file, _ in kind.test_list])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": sums[kind.meta["filename"]]})
    return parts


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_an_archive(name, tmp_path, monkeypatch):
    parts = make_archive(tmp_path, name, monkeypatch)
    train, test = load_cifar(name, tmp_path)
    files = [file for file, _ in DATASETS[name].train_list]
    assert (train.lengths, test.lengths, train.classes) == ((20 * len(files),), (20,), 10)
    images, targets = parts[files[-1]]
    last = train.read(20 * len(files) - 1)
    assert last.label == targets[19]
    assert np.array_equal(last.image.transpose(2, 0, 1).ravel(), images[19])  # red, green, blue planes
    data = open_data(DataChoice(name, 1, 0, tmp_path), ALONE)
    few, held_out = data.training, data.held_out
    assert sorted(labels(few)) == list(range(10))
    assert keys(held_out) == keys(test)


def test_cifar_without_archive_or_network(tmp_path, monkeypatch):
    monkeypatch.setattr(DATASETS["cifar10"], "url", f"file://{tmp_path}/nowhere/cifar-10-python.tar.gz")
    with pytest.raises(FractalError, match=r"cannot be downloaded \(.*\); fetch it elsewhere, put cifar-10-python"):
        load_cifar("cifar10", tmp_path)


def test_cifar_archive_that_is_not_the_published_one(tmp_path, monkeypatch):
    make_archive(tmp_path, "cifar10", monkeypatch)
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(DATASETS["cifar10"], "url", f"file://{tmp_path}/nowhere/cifar-10-python.tar.gz")
    with pytest.raises(
        FractalError, match=r"cifar-10-python\.tar\.gz: not as published, or damaged, .*; fetch it from .* again"
    ):
        load_cifar("cifar10", tmp_path)
    assert not (tmp_path / "cifar-10-batches-py").exists()


def make_folders(path: Path, classes: dict[str, list[str]]) -> None:
    for part, names in classes.items():
        for number, name in enumerate(names):
            folder = path / part / name
            folder.mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (10 + number, 7), (number, index, 0)).save(folder / f"{index}.png")


def test_image_folders(tmp_path):
    make_folders(tmp_path, {"train": ["ant", "bee"], "val": ["ant", "bee"]})
    data = open_data(DataChoice(f"imagefolder:{tmp_path}", 2, 0, Path("unused")), ALONE)
    train, held_out = data.training, data.held_out
    assert sorted(labels(train)) == [0, 0, 1, 1]
    assert keys(held_out) == [f"{name}/{index}.png" for name in ("ant", "bee") for index in range(3)]
    assert held_out.read(4).image.shape == (7, 11, 3)
    assert held_out.read(4).image[0, 0].tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({}, "train: no such folder; images belong into PATH/train/CLASS/"),
        ({"train": ["ant"]}, "val: no such folder"),
        ({"train": ["ant", "bee"], "val": ["ant"]}, r"train and val differ in their class folders \(bee\)"),
    ],
)
def test_image_folders_that_do_not_fit(tmp_path, folders, message):
    make_folders(tmp_path, folders)
    with pytest.raises(FractalError, match=message):
        open_data(DataChoice(f"imagefolder:{tmp_path}", None, 0, Path("unused")), ALONE)


def test_empty_image_folder(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(FractalError, match=r"train: Couldn't find any class folder.*images belong into"):
        open_data(DataChoice(f"imagefolder:{tmp_path}", None, 0, Path("unused")), ALONE)
    (tmp_path / "train" / "ant").mkdir()
    with pytest.raises(FractalError, match=r"train: Found no valid file for the classes ant; images belong into"):
        open_data(DataChoice(f"imagefolder:{tmp_path}", None, 0, Path("unused")), ALONE)


def test_damaged_image_is_named(tmp_path):
    make_folders(tmp_path, {"train": ["ant"], "val": ["ant"]})
    (tmp_path / "train" / "ant" / "1.png").write_bytes(b"no image")
    train = open_data(DataChoice(f"imagefolder:{tmp_path}", None, 0, Path("unused")), ALONE).training
    with pytest.raises(FractalError, match=r"ant/1\.png: image cannot be decoded.*; replace or remove it"):
        train.read(1)
    (tmp_path / "train" / "ant" / "1.png").unlink()
    with pytest.raises(FractalError, match=rf"^{tmp_path}/train/ant/1\.png: No such file or directory"):
        train.read(1)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_unpacked_without_its_archive(name, tmp_path, monkeypatch):
    make_archive(tmp_path, name, monkeypatch)
    archive = tmp_path / DATASETS[name].filename
    shutil.unpack_archive(archive, tmp_path)
    archive.unlink()
    monkeypatch.setattr(DATASETS[name], "url", f"file://{tmp_path}/nowhere.tar.gz")
    assert load_cifar(name, tmp_path)[1].lengths == (20,)
    file = tmp_path / DATASETS[name].base_folder / DATASETS[name].test_list[0][0]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FractalError, match=rf"{DATASETS[name].base_folder}: not as published, or damaged, .* again$"):
        load_cifar(name, tmp_path)


def test_cifar_download_that_is_something_else(tmp_path, monkeypatch, web):
    make_archive(tmp_path, "cifar10", monkeypatch)
    portal = tmp_path / "log-in-here.html"
    portal.write_text("<html>")
    monkeypatch.setattr(DATASETS["cifar10"], "url", f"{web(tmp_path).url}/log-in-here.html")
    with pytest.raises(FractalError, match=r"cifar-10-python\.tar\.gz: damaged \(.*\); remove it and run again"):
        load_cifar("cifar10", tmp_path / "data")
