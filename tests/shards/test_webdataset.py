"""WebDataset folders written by other programs, real and hostile."""

import gzip
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from damages import edit_split, tar_header
from fractalshards import tars as tars_module
from fractalshards.errors import FractalError, UsageError
from fractalshards.manifest import RECIPE
from fractalshards.tars import Tar, TarIndex, index_digest, index_tar, index_tars
from fractalshards.webdataset import DEFAULT_OPTIONS, WebDatasetOptions, find_dataset, is_webdataset, load_webdataset
from packing import write_tar


def samples(count: int, folder: str = "") -> dict[str, bytes]:
    files = {}
    for number in range(count):
        files[f"{folder}n{number:03d}.jpg"] = b"image %d" % number
        files[f"{folder}n{number:03d}.cls"] = b"%d" % (number % 7)
        files[f"{folder}n{number:03d}.json"] = b"{}"
    return files


def found(path: Path, index: TarIndex) -> list[tuple[str, bytes, int]]:
    data = path.read_bytes()
    rows = zip(map(index.key, range(len(index))), index.starts, index.starts + index.sizes, index.labels, strict=True)
    return [(key, data[start:stop], label) for key, start, stop, label in rows]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["", "./", "imagenet/train/", "x" * 90 + "/" + "y" * 90 + "/"])
def test_index_of_real_headers(tmp_path, form, folder):
    """Fractional times make pax headers, names over 100 bytes GNU's or pax headers or ustar's prefix."""
    times = {"mtime": 1234.5} if form == tarfile.PAX_FORMAT else {}
    path = write_tar(tmp_path / "a.tar", samples(5, folder), form, uname="somebody", mode=0o600, **times)
    prefix = folder.removeprefix("./")
    assert found(path, index_tar(Tar(path))) == [(f"{prefix}n{n:03d}", b"image %d" % n, n % 7) for n in range(5)]


def test_index_is_what_webdataset_reads(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(9, "some.folder/x/"))
    read = webdataset.WebDataset([str(path)], shardshuffle=False)
    assert found(path, index_tar(Tar(path))) == [(s["__key__"], s["jpg"], int(s["cls"])) for s in read]


@pytest.mark.parametrize(
    "members",
    [
        [("._a.png", b"x"), ("a.png", b"A"), ("._a.cls", b"x"), ("a.cls", b"1"), ("b.png", b"B"), ("b.cls", b"2")],
        [("./._x", b"x"), ("./x/a.png", b"A"), ("./x/._a.cls", b"x"), ("./x/a.cls", b"1"), ("x/b.png", b"B"),
         ("x/.DS_Store", b"x"), ("x/b.cls", b"2"), ("__MACOSX/x/._b.png", b"x"), ("__MACOSX/x/b.png", b"x")],
        [("a.png", b"A"), ("README", b"x"), ("a.cls", b"1"), (".AppleDouble/a.png", b"x"), ("b.png", b"B"),
         ("__meta__/b.png", b"x"), ("@eaDir/b.png/thumb.jpg", b"x"), ("b.cls", b"2")],
        [("a.png", b"A"), ("a.cls", b"1"), ("c.txt", b"2"), ("d/e", "./c.txt"), ("b.cls", "d/e"), ("./b.png", b"B")],
        [(".x", b"x"), ("a.txt", b"cat"), ("a.PNG", b"A"), ("a.cls", b" 1\n"), ("x.json", b"{}"),
         ("b.seg.png", b"x"), ("b.cls", b"2"), ("b.webp", b"B")],
    ],
    ids=["macOS", "macOS in a folder", "no extension", "hard links", "files of other kinds"],
)  # fmt: skip
def test_index_ignores_other_members(tmp_path, members):
    path = write_tar(tmp_path / "a.tar", members)
    others = tar_header("y", 0, tarfile.DIRTYPE) + tar_header("y/0.jpg", 0, tarfile.SYMTYPE, linkname="/etc/passwd")
    path.write_bytes(others + path.read_bytes())
    read = found(path, index_tar(Tar(path)))
    assert [(Path(key).name, *rest) for key, *rest in read] == [("a", b"A", 1), ("b", b"B", 2)]


@pytest.mark.parametrize("label", ["3", "3.0", '"3"', '"03"', ' "3" '])
def test_labels_in_json(tmp_path, label):
    path = write_tar(tmp_path / "a.tar", {"a.png": b"A", "a.json": f'{{"label": {label}, "caption": "x"}}'.encode()})
    assert found(path, index_tar(Tar(path, label_key="label"))) == [("a", b"A", 3)]


@pytest.mark.parametrize(
    ("files", "noun"),
    [
        ({"a.jpg": b"A"}, r"\.cls"),
        ({"a.v2.jpg": b"A", "a.v2.cls": b"1"}, "first dot"),
        ({"a.cls": b"1"}, "image"),
        ({"a.jpg": b"A", "a.cls": b"cat"}, "label b'cat'"),
        ({"a.jpg": b"A", "a.cls": b"1" * 5000}, "label b'1{20}'"),
        ({"a.jpg": b"A", "a.cls": "٣".encode()}, "label"),
        ({"a.jpg": b"A", "a.JPG": b"A", "a.cls": b"1"}, r"\.jpg"),
        ({"a.jpg": b"ABC", "a.cls": b"1"}, "image larger"),
        *(({"a.jpg": b"A", "a.cls": link}, r"\.cls") for link in ("/etc/hostname", "../b.cls", "a.cls", "b.cls")),
        *(
            ({"a.jpg": b"A", "a.json": text.encode()}, "label|json")
            for text in ("{", "[3]", "{}", '{"label": -1}', '{"label": [3]}', '{"label": null}', '{"label": 3.5}',
                '{"label": "cat"}', '{"label": 3000000000}', '{"label": 3, "x": "' + "x" * (1 << 20) + '"}',
                '{"x":' + "[" * 100_000)
        ),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_unusable_samples_are_named_or_left_out(tmp_path, monkeypatch, caplog, files, noun):
    monkeypatch.setattr(tars_module, "MAX_SAMPLE_BYTES", 2)
    members = {**files, "b.jpg": b"B", "b.cls": b"1", "b.json": b'{"label": 1}'}
    tar = Tar(write_tar(tmp_path / "a.tar", members), 2, "label" if "a.json" in files else None)
    with pytest.raises(FractalError, match=rf"a\.tar: a .*({noun})") as error:
        index_tars([tar])
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    (index,) = index_tars([tar], skip_bad=True)
    assert (len(index), index.key(0), index.labels.tolist()) == (1, "b", [1])
    assert "1 bad sample" in caplog.text


def huge_header(path: Path) -> None:
    path.write_bytes(tar_header("././@LongLink", 4 << 30, tarfile.GNUTYPE_LONGNAME))
    os.truncate(path, 5 << 30)  # the name is a hole in the file


TAR = b"".join(tar_header(name, len(data)) + data.ljust(512, b"\0") for name, data in samples(5).items()) + bytes(1024)
UNREADABLE = {
    "compressed": (gzip.compress(TAR), "decompress"),
    **{f"{length} bytes": (TAR[:length], "") for length in (100, 2000, 4200)},
    "damaged": (TAR[:4100] + b"x" + TAR[4101:], "header at byte 4,096"),
    "negative": (tar_header("a.jpg", 0) + tar_header("b.zip", -512, b"Z"), "size"),  # the next header is that of b.zip
    "long names": ((tar_header("././@LongLink", 5, tarfile.GNUTYPE_LONGNAME) + b"name\0" + bytes(507)) * 2000, "tar"),
    "huge header": (huge_header, "header"),
    "pipe": (os.mkfifo, "regular"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_index_refuses(tmp_path, name):
    path, (content, noun) = tmp_path / "a.tar", UNREADABLE[name]
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    with pytest.raises(FractalError, match=rf"a\.tar: .*{noun}"):
        index_tar(Tar(path))


def test_index_of_random_damage_stays_in_bounds(tmp_path):
    clean = write_tar(tmp_path / "clean.tar", samples(4), tarfile.PAX_FORMAT, mtime=1.5).read_bytes()
    generator = np.random.default_rng(0)
    path = tmp_path / "a.tar"
    for _ in range(300):
        data = bytearray(clean)
        for place in generator.integers(0, len(data), 6):
            data[place] = generator.integers(0, 256)
        path.write_bytes(data)
        try:
            index = index_tar(Tar(path))
        except FractalError:
            continue
        assert (index.starts + index.sizes <= len(data)).all()
        assert (index.labels >= 0).all()


def folder_of(tmp_path: Path, counts: dict[str, list[int]], **more: object) -> Path:
    folder = tmp_path / "theirs"
    folder.mkdir()
    splits = {}
    for split, lengths in counts.items():
        names = [f"{split}-{number:04d}.tar" for number in range(len(lengths))]
        for name, length in zip(names, lengths, strict=True):
            write_tar(folder / name, samples(length))
        splits[split] = {"name": split, "num_samples": sum(lengths), "filenames": names, "shard_lengths": lengths}
    (folder / "_info.json").write_text(json.dumps({"splits": splits, **more}))
    return folder


def test_load_webdataset(tmp_path):
    folder = folder_of(tmp_path, {"train": [3, 2], "validation": [4]}, num_classes=9)
    info = load_webdataset(folder, DEFAULT_OPTIONS)
    assert is_webdataset(folder)
    assert info.classes == 9
    assert info.splits["train"] == (Tar(folder / "train-0000.tar", 3), Tar(folder / "train-0001.tar", 2))
    assert [len(index) for index in index_tars(info.splits["train"])] == [3, 2]
    with pytest.raises(FractalError, match=r"train-0000\.tar: "):
        index_tars([Tar(folder / "train-0000.tar", 4)])
    odd = ["set a=b+c (1).tar", "bilder/größe.tar"]
    (folder / "bilder").mkdir()
    for number, name in enumerate(odd):
        (folder / f"train-000{number}.tar").rename(folder / name)
    edit_split(folder, filenames=odd)
    assert [len(index) for index in index_tars(load_webdataset(folder, DEFAULT_OPTIONS).splits["train"])] == [3, 2]


def test_info_json_and_its_label_key(tmp_path):
    folder = folder_of(tmp_path, {"train": [1]})
    edit_split(folder, alt_label="label")
    (folder / "_info.json").rename(folder / "info.json")
    assert find_dataset(folder, DEFAULT_OPTIONS)
    assert load_webdataset(folder, DEFAULT_OPTIONS).splits["train"] == (Tar(folder / "train-0000.tar", 1, "label"),)
    options = WebDatasetOptions.parse("target", "val=train*")
    assert load_webdataset(folder, options).splits["val"] == (Tar(folder / "train-0000.tar", 1, "target"),)
    for without_tars in ('{"splits": {"train": {"num_examples": 1}}}', "{}"):
        (folder / "info.json").write_text(without_tars)
        assert load_webdataset(folder, DEFAULT_OPTIONS).splits == {"train": (Tar(folder / "train-0000.tar"),)}


@pytest.mark.parametrize("splits", ["[]", '{"train": {"filenames": ["a.tar"], "shard_lengths": [1, 2]}}'])
def test_damaged_info_file_is_refused(tmp_path, splits):
    folder = folder_of(tmp_path, {"train": [1]})
    (folder / "_info.json").write_text(f'{{"splits": {splits}}}')
    with pytest.raises(FractalError, match=r"info\.json.*remove"):
        load_webdataset(folder, DEFAULT_OPTIONS)


def splits_of(folder: Path, names: str, split: str | None = None) -> dict[str, str]:
    """The splits of a folder of empty tars, both as names with spaces between them."""
    for name in names.split():
        write_tar(folder / name, {})
    splits = load_webdataset(folder, WebDatasetOptions.parse(None, split)).splits
    return {split: " ".join(str(tar.path.relative_to(folder)) for tar in tars) for split, tars in splits.items()}


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        ("0.tar 1.tar ._1.tar .x.tar", None, {"train": "0.tar 1.tar"}),
        ("0.tar 1.tar", "val=1*", {"train": "0.tar", "val": "1.tar"}),
        ("0.tar 1.tar 2.tar", "train=0.tar, val=1.tar,train=*", {"train": "0.tar 2.tar", "val": "1.tar"}),
        ("in1k-train-0.tar in1k_validation_1.tar", None, {"train": "in1k-train-0.tar", "val": "in1k_validation_1.tar"}),
        ("TRAIN2017.tar test2017.tar", None, {"train": "TRAIN2017.tar", "test": "test2017.tar"}),
        ("train-0.tar test-1.tar", "val=test-*", {"train": "train-0.tar", "val": "test-1.tar"}),
        ("train/0.tar val/0.tar val/._0.tar more/0.tar", None, {"train": "train/0.tar", "val": "val/0.tar"}),
        ("train/0.tar val/0.tar", "val=train/*", {"val": "train/0.tar"}),
        ("0.tar 1.tar 2.tar", "train=0*", {"train": "0.tar"}),
        ("train-0.tar extra.tar val-1.tar", "train=train*,val=val*", {"train": "train-0.tar", "val": "val-1.tar"}),
        ("0.tar train/1.tar", None, {"train": "0.tar"}),
    ],
)
def test_splits_without_an_info_file(tmp_path, names, split, expected):
    (tmp_path / "00000_stats.json").write_text("{}")
    assert splits_of(tmp_path, names, split) == expected
    assert find_dataset(tmp_path, DEFAULT_OPTIONS)


@pytest.mark.parametrize(
    ("names", "split", "error", "noun"),
    [
        ("0.tar val-1.tar", None, FractalError, "0.tar.*--split"),
        ("train-val-1.tar", None, FractalError, "train-val-1.tar.*--split"),
        ("0.tar", "val=1*", UsageError, "val=1.*0.tar"),
        ("0.tar", "validation=0*", UsageError, "--split"),
        ("0.tar", "val=", UsageError, "--split"),
        ("0.tar", "", UsageError, "--split"),
        ("a:b.tar", None, FractalError, "a:b.tar"),
        ("", None, FractalError, "tar"),
    ],
)
def test_splits_that_are_not_clear_are_refused(tmp_path, names, split, error, noun):
    with pytest.raises(error, match=rf"\A.*{noun}.*\Z"):  # one line
        splits_of(tmp_path, names, split)


def test_find_dataset_knows_ours_from_others(tmp_path):
    write_tar(tmp_path / "train-000000.tar", {})
    (tmp_path / RECIPE).write_text("{}")
    with pytest.raises(FractalError, match=r"_info\.json"):  # our own build, which has not finished
        find_dataset(tmp_path, DEFAULT_OPTIONS)
    (tmp_path / "_info.json").write_text('{"format_version": 1}')
    assert not find_dataset(tmp_path, DEFAULT_OPTIONS)
    with pytest.raises(UsageError, match="--label-key"):
        find_dataset(tmp_path, WebDatasetOptions.parse("label", None))
    for folder in (tmp_path / "nowhere", tmp_path / RECIPE):
        with pytest.raises(FractalError, match=folder.name):
            find_dataset(folder, DEFAULT_OPTIONS)


@pytest.mark.parametrize(
    "name", ["../x.tar", "/etc/x.tar", "pipe:rm -rf x.tar", ".x.tar", "a/.tar", "a\\b.tar", "a\n.tar"]
)
def test_load_webdataset_rejects_names_that_lead_out(tmp_path, name):
    folder = folder_of(tmp_path, {"train": [1]})
    edit_split(folder, filenames=[name])
    with pytest.raises(FractalError, match=r"_info\.json"):
        load_webdataset(folder, DEFAULT_OPTIONS)


def test_index_of_another_tar_under_the_same_name(tmp_path):
    folder = folder_of(tmp_path, {"train": [3, 2, 4, 1, 2, 5]})  # so many that worker processes read them
    tars = load_webdataset(folder, DEFAULT_OPTIONS).splits["train"]
    old = index_tars(tars)
    assert index_digest(index_tars(tars)) == index_digest(old)
    write_tar(tars[0].path, {name: b"5" if name.endswith("cls") else data for name, data in samples(3).items()})
    new = index_tars(tars)
    assert new[0].labels.tolist() == [5, 5, 5]
    assert index_digest(new) != index_digest(old)
