"""Datasets to train and evaluate on: digits, CIFAR, folders of images, packed images, WebDataset folders."""

import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits
from torchvision.datasets import CIFAR10, CIFAR100

from fractalshards.errors import FractalError
from fractalshards.pack import parse_source, plan_pack, run_pack
from fractaltrain.config import ImagesConfig
from fractaltrain.data.images import FolderSource, load_digits, load_published, open_data
from fractaltrain.data.shards import open_shards
from fractaltrain.data.source import InMemorySource, SampleSource, Splits, divide
from fractaltrain.log import read_metrics
from fractaltrain.recipes import PT_RECIPES
from fractaltrain.recipes.recipe import change
from fractaltrain.stream.loader import epoch_loader
from fractaltrain.transforms import train_transform
from tiny_training import ALONE

CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def open_images(name: str, per_class: int | None = None, seed: int = 0, folder: Path = Path("unused")) -> Splits:
    return open_data(ImagesConfig(name, per_class, seed, folder), ALONE)


def keys(source: SampleSource) -> list[str]:
    return [source.read(index).key for index in range(sum(source.lengths))]


def labels(source: SampleSource) -> list[int]:
    return [source.read(index).label for index in range(sum(source.lengths))]


def test_images_import_neither_torch_nor_scikit_learn():
    """The command line needs the names of data for its help."""
    names = "('torch', 'torchvision', 'sklearn', 'timm')"
    code = f"import sys, fractaltrain.data.images; assert not [name for name in {names} if name in sys.modules]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digits_are_scikit_learns_images():
    source, original = load_digits(), sklearn_digits()
    assert (source.classes, source.images.shape, source.images.dtype) == (10, (1797, 8, 8, 3), np.uint8)
    assert np.abs(source.images[..., 1] / 255 * 16 - original.images).max() < 0.04
    assert np.array_equal(source.labels, original.target)


@pytest.mark.parametrize("per_class", [5, None])
def test_digits_are_split_by_class(per_class):
    digits = open_images("digits", per_class)
    counts = np.bincount(labels(digits.train))
    if per_class:
        assert counts.tolist() == [per_class] * 10
    else:
        assert np.allclose(counts / np.bincount(sklearn_digits().target), 0.8, atol=0.003)
    assert sorted(keys(digits.train) + keys(digits.val)) == [f"digits/{index:06d}" for index in range(1797)]


def test_subset_is_a_function_of_its_seed():
    chosen = keys(open_images("digits", 5, seed=1).train)
    assert set(chosen) != set(keys(open_images("digits", 5, seed=2).train))
    assert hashlib.sha256(" ".join(chosen).encode()).hexdigest()[:16] == "fa8179bcd0fb27b3"


def test_subset_larger_than_a_class_is_refused():
    source = InMemorySource("few", np.zeros((5, 8, 8, 3), np.uint8), np.array([0, 0, 0, 1, 1]), classes=2)
    with pytest.raises(FractalError, match=r"class 1 has 2 .*--per-class"):
        divide(source, 3, seed=0)


def make_archive(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple]:
    """Write an archive as CIFAR's authors do, and make torchvision expect its checksums and not reach the network."""
    dataset = CIFAR[name]
    label_key = "labels" if name == "cifar10" else "fine_labels"
    contents, sums = {}, {}
    with tarfile.open(folder / dataset.filename, "w:gz") as archive:

        def add(file: str, content: dict) -> None:
            data = pickle.dumps(content, protocol=2)
            sums[file] = hashlib.md5(data).hexdigest()
            member = tarfile.TarInfo(f"{dataset.base_folder}/{file}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

        for number, (file, _) in enumerate(dataset.train_list + dataset.test_list):
            images = np.random.default_rng(number).integers(0, 256, (20, 3072), np.uint8)
            contents[file] = images, [index % 10 for index in range(20)]
            add(file, {"data": images, label_key: contents[file][1]})
        add(dataset.meta["filename"], {dataset.meta["key"]: [f"class {index}" for index in range(10)]})
    monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5((folder / dataset.filename).read_bytes()).hexdigest())
    monkeypatch.setattr(dataset, "train_list", [[file, sums[file]] for file, _ in dataset.train_list])
    monkeypatch.setattr(dataset, "test_list", [[file, sums[file]] for file, _ in dataset.test_list])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": sums[dataset.meta["filename"]]})
    monkeypatch.setattr(dataset, "url", f"file://{folder}/nowhere/{dataset.filename}")
    return contents


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_its_archive_or_unpacked_folder(name, tmp_path, monkeypatch):
    contents = make_archive(tmp_path, name, monkeypatch)
    files = [file for file, _ in CIFAR[name].train_list]
    cifar = open_images(name, per_class=1, folder=tmp_path)
    assert sorted(labels(cifar.train)) == list(range(10))
    assert cifar.val.lengths == (20,)
    train, _ = load_published(name, tmp_path)
    images, targets = contents[files[-1]]
    last = train.read(20 * len(files) - 1)
    assert last.label == targets[19]
    assert np.array_equal(last.image.transpose(2, 0, 1).ravel(), images[19])  # red, green, blue planes
    (tmp_path / CIFAR[name].filename).unlink()
    assert keys(load_published(name, tmp_path)[1]) == keys(cifar.val)
    file = tmp_path / CIFAR[name].base_folder / CIFAR[name].test_list[0][0]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FractalError, match="--data-dir"):
        load_published(name, tmp_path)


def make_folders(path: Path, classes: dict[str, list[str]]) -> str:
    for split, names in classes.items():
        (path / split).mkdir()
        for number, name in enumerate(names):
            (path / split / name).mkdir()
            for index in range(3):
                image = Image.new("RGB", (10 + number, 7), (number, index, 0))
                image.save(path / split / name / f"{index}.png")
    return f"imagefolder:{path}"


def test_image_folders(tmp_path):
    """Hidden files and folders are no images and classes."""
    name = make_folders(tmp_path, {"train": ["ant", "bee"], "val": ["ant", "bee"]})
    for folder in ("train/.ipynb_checkpoints", "train/ant/.thumbnails", "val/.AppleDouble", "val/@eaDir"):
        shutil.copytree(tmp_path / "train" / "bee", tmp_path / folder)
    (tmp_path / "train" / "lost+found").mkdir()
    (tmp_path / "val" / "bee" / "._0.png").write_bytes(b"no image")
    photos = open_images(name, per_class=2)
    assert sorted(labels(photos.train)) == [0, 0, 1, 1]
    assert photos.train.class_names == photos.val.class_names == ("ant", "bee")
    assert keys(photos.val) == [f"{name}/{index}.png" for name in ("ant", "bee") for index in range(3)]
    assert photos.val.read(4).image.shape == (7, 11, 3)
    assert photos.val.read(4).image[0, 0].tolist() == [1, 1, 0]


def test_home_is_expanded_inside_of_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_folders(tmp_path, {"train": ["ant"], "val": ["ant"]})
    assert keys(open_images("imagefolder:~").train) == ["ant/0.png", "ant/1.png", "ant/2.png"]


@pytest.mark.parametrize(
    ("folders", "noun"),
    [
        ({}, "train: "),
        ({"train": ["ant"]}, "val: "),
        ({"train": ["ant", "bee"], "val": ["ant"]}, r"class folders \(bee\)"),
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
def test_image_folders_that_change_have_another_digest(tmp_path, split):
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


def test_run_on_image_folders_that_changed_is_not_continued(fractaltrain, tmp_path, monkeypatch):
    name = make_folders(tmp_path, {"train": ["ant", "bee"], "val": ["ant", "bee"]})
    command = ("ft", "--weights", "none", "--data", name, "--model", "test_resnet", "--image-size", 16,
               "--batch-size", 4, "--epochs", 1, "--out", tmp_path / "run")  # fmt: skip
    assert [fractaltrain(*command).code for _ in range(2)] == [0, 0]
    with monkeypatch.context() as patch:  # there may be millions of files, on a file system that many share
        patch.setattr(FolderSource, "describe", lambda self: pytest.fail("eval looks at every file"))
        assert fractaltrain("eval", "--weights", tmp_path / "run", "--data", name).code == 0
    (tmp_path / "val" / "ant" / "new.png").write_bytes((tmp_path / "val" / "ant" / "0.png").read_bytes())
    refused = fractaltrain(*command)
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert "data_digest" in refused.err


def write_webdataset(folder: Path, image_file: Callable[..., bytes], splits: dict[str, list[int]], **info: int) -> Path:
    """Tars as others write them: PNG and JPEG of several sizes, json beside the cls, pax headers, long names."""
    folder.mkdir()
    described = {}
    for split, lengths in splits.items():
        names = [f"in-{split}-{number:03d}.tar" for number in range(len(lengths))]
        for name, length in zip(names, lengths, strict=True):
            with tarfile.open(folder / name, "w", format=tarfile.PAX_FORMAT) as tar:
                for number in range(length):
                    form = ("PNG", "JPEG")[number % 2]
                    image = image_file(form, 40 + number, 33, number)
                    files = {form.lower().replace("jpeg", "jpg"): image, "cls": b"%d" % (number % 4), "json": b"{}"}
                    for extension, data in files.items():
                        member = tarfile.TarInfo(f"./{split}/{number:05d}.{extension}")
                        member.size, member.mtime = len(data), 1.25
                        tar.addfile(member, io.BytesIO(data))
        described[split] = {"num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
    (folder / "_info.json").write_text(json.dumps({"splits": described, **info}))
    return folder


def epoch(source: SampleSource, crop: str, workers: int) -> list[tuple[str, int, bytes]]:
    transform = train_transform(change(PT_RECIPES["anderson"], {"crop": crop}), 24)
    order = np.arange(sum(source.lengths))
    positions = order[: len(order) // 4 * 4].reshape(-1, 4)
    return [
        (key, int(label), image.numpy().tobytes())
        for batch in epoch_loader(source, transform, positions, order, 0, 0, workers=workers)
        for key, label, image in zip(batch.keys, batch.labels, batch.images, strict=True)
    ]


@pytest.mark.parametrize("crop", ["none", "resized"])
def test_webdataset_folder_is_streamed(tmp_path, image_file, crop):
    folder = write_webdataset(tmp_path / "theirs", image_file, {"train": [5, 7], "validation": [3]})
    before = sorted(folder.iterdir())
    splits = open_shards(folder, ALONE)
    assert (splits.train.lengths, splits.val.lengths) == ((5, 7), (3,))
    assert (splits.train.classes, splits.image_size) == (4, None)
    seen = epoch(splits.train, crop, workers=0)
    assert [key for key, *_ in seen] == [f"train/{number:05d}" for number in (*range(5), *range(7))]
    assert [label for _, label, _ in seen] == [number % 4 for number in (*range(5), *range(7))]
    assert epoch(splits.train, crop, workers=2) == seen
    for number in range(4):
        with Image.open(io.BytesIO(image_file(("PNG", "JPEG")[number % 2], 40 + number, 33, number))) as picture:
            assert np.array_equal(splits.train.read(number).image, np.asarray(picture.convert("RGB")))
    assert sorted(folder.iterdir()) == before  # nothing is written there


@pytest.mark.parametrize(
    ("splits", "info", "noun"),
    [
        ({"train": [4]}, {"num_classes": 3}, "3 classes"),
        ({"test": [4]}, {}, "'train'"),
        ({"train": []}, {}, r"\.tar"),
        ({"train": [4], "val": [0]}, {}, "no samples in val"),
    ],
)
def test_webdataset_folder_without_sound_classes_or_splits_is_refused(tmp_path, image_file, splits, info, noun):
    with pytest.raises(FractalError, match=noun):
        open_shards(write_webdataset(tmp_path / "theirs", image_file, splits, **info), ALONE)


def test_damaged_image_of_a_webdataset_folder_is_named(tmp_path, image_file):
    folder = write_webdataset(tmp_path / "theirs", image_file, {"train": [4]}, num_classes=9)
    source = open_shards(folder, ALONE).train
    assert source.classes == 9
    data = bytearray((folder / "in-train-000.tar").read_bytes())
    data[data.index(b"IDAT") + 8 : data.index(b"IEND")] = bytes(data.index(b"IEND") - data.index(b"IDAT") - 8)
    (folder / "in-train-000.tar").write_bytes(data)
    with pytest.raises(FractalError, match=r"in-train-000\.tar: train/00000: "):
        source.read(0)


def test_tars_without_an_info_file_and_with_labels_in_json(tmp_path, image_file, fractaltrain):
    """As img2dataset writes them; one sample has no label."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(8):
                meta = {"caption": "x"} if (shard, number) == (1, 2) else {"caption": "x", "label": number % 2}
                files = {"jpg": image_file("JPEG", 20, 20, number), "txt": b"x", "json": json.dumps(meta).encode()}
                for extension, data in files.items():
                    member = tarfile.TarInfo(f"{shard:05d}{number:04d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    command = (
        "ft", "--weights", "none", "--model", "test_resnet", "--data", f"shards:{folder}", "--out", tmp_path / "run",
        "--image-size", 32, "--batch-size", 5, "--epochs", 1, "--set", "lr=0.01",
    )  # fmt: skip
    for options, noun in (((), "--label-key"), (("--label-key", "label"), "000010002"), (("--split", "val=9*"), "9*")):
        refused = fractaltrain(*command, *options)
        assert (refused.code, refused.err.splitlines()[-1].count("error: ")) == (2 if noun == "9*" else 1, 1)
        assert noun in refused.err.splitlines()[-1]
    options = ("--label-key", "label", "--on-bad-sample", "skip")
    assert "--split" in fractaltrain(*command, *options).err  # no split to evaluate on
    done = fractaltrain(*command, *options, "--split", "val=00002.tar")
    assert (done.code, "1 bad sample" in done.err, "000010002" in done.err) == (0, True, True)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["samples"] == 8
    (tmp_path / "val").mkdir()
    (folder / "00002.tar").rename(tmp_path / "val" / "00002.tar")
    command = ("eval", "--weights", tmp_path / "run", "--data", f"shards:{tmp_path / 'val'}", "--label-key", "label")
    assert "--split" in fractaltrain(*command).err
    assert "8 val images" in fractaltrain(*command, "--split", "val=*").out


def test_pretraining_on_a_webdataset_folder(tmp_path, image_file, fractaltrain):
    folder = write_webdataset(tmp_path / "theirs", image_file, {"train": [9, 8], "validation": [3]})
    command = (
        "pt", "--shards", folder, "--out", tmp_path / "run", "--model", "test_resnet", "--batch-size", 4,
        "--image-size", 32, "--epochs", 1, "--set", "crop=resized", "--set", "repeats=3", "--set", "mixup=0.8",
    )  # fmt: skip
    assert [fractaltrain(*command).code for _ in range(2)] == [0, 0]
    (last,) = (line for line in read_metrics(tmp_path / "run") if line["split"] == "epoch")
    assert (last["step"], last["samples"]) == (3, 3)  # floor(17 / 3) samples three times, in batches of 4


def test_packed_images_of_several_sizes(tmp_path, image_folder):
    folder = image_folder(tmp_path / "images", {"cat": 6, "dog": 6})
    source = parse_source(f"imagefolder:{folder}", None)
    plan = plan_pack(tmp_path / "packed", source, source.list_images(tmp_path / "packed"), seed=0, shard_size=5)
    run_pack(plan, workers=1)
    source = open_shards(tmp_path / "packed", ALONE).train
    assert source.class_names == ("cat", "dog")
    assert len({source.read(index).image.shape for index in range(12)}) > 3
    for crop in ("none", "random", "resized"):
        assert [len(pixels) for _, _, pixels in epoch(source, crop, workers=0)] == [24 * 24 * 3] * 12


def test_labels_and_counts_of_shards(dataset, tmp_path):
    """They come from headers and sidecars, and must agree."""
    source = open_shards(dataset, ALONE).train
    assert source.labels.tolist() == labels(source)
    assert source.label_counts.tolist() == np.bincount(labels(source)).tolist()
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    sidecar = copy / "train-000000.json"
    record = json.loads(sidecar.read_text())
    record["label_counts"][0] += 1
    record["label_counts"][1] -= 1
    sidecar.write_text(json.dumps(record))
    with pytest.raises(FractalError, match="labels"):
        _ = open_shards(copy, ALONE).train.labels
