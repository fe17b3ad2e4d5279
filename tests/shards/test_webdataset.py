"""WebDataset folders written by other programs, real and hostile."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from fractalshards import webdataset as webdataset_module
from fractalshards.errors import FractalError
from fractalshards.webdataset import TarIndex, index_digest, index_tar, index_tars, is_webdataset, load_webdataset

Files = dict[str, bytes]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_tar(path: Path, files: Files, form: int = tarfile.USTAR_FORMAT, **fields: object) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            for field, value in fields.items():
                setattr(member, field, value)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(count: int, folder: str = "") -> Files:
    files = {}
    for number in range(count):
        files[f"{folder}n{number:03d}.jpg"] = b"image %d" % number
        files[f"{folder}n{number:03d}.cls"] = b"%d" % (number % 7)
        files[f"{folder}n{number:03d}.json"] = b"{}"
    return files


def found(path: Path, index: TarIndex) -> list[tuple[str, bytes, int]]:
    data = path.read_bytes()
    places = zip(index.starts.tolist(), index.sizes.tolist(), index.labels.tolist(), strict=True)
    return [
        (index.key(number), data[start : start + size], label) for number, (start, size, label) in enumerate(places)
    ]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["", "./", "imagenet/train/", "x" * 90 + "/" + "y" * 90 + "/"])
def test_index_of_real_headers(tmp_path, form, folder):
    """Fractional times make pax headers, names over 100 bytes GNU's or pax headers or ustar's prefix."""
    times = {"mtime": 1234.5} if form == tarfile.PAX_FORMAT else {}
    path = write_tar(tmp_path / "a.tar", samples(5, folder), form, uname="somebody", mode=0o600, **times)
    prefix = folder.removeprefix("./")
    assert found(path, index_tar(path)) == [(f"{prefix}n{n:03d}", b"image %d" % n, n % 7) for n in range(5)]


def test_index_is_what_webdataset_reads(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(9, "some.folder/x/"))
    read = webdataset.WebDataset([str(path)], shardshuffle=False)
    assert found(path, index_tar(path)) == [(s["__key__"], s["jpg"], int(s["cls"])) for s in read]


def test_index_ignores_other_files(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("data")
        folder.type = tarfile.DIRTYPE
        link = tarfile.TarInfo("data/zero.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(folder)
        tar.addfile(link)
        files = {
            "README.md": b"?", ".hidden": b"", "a.txt": b"cat", "a.PNG": b"A", "a.cls": b" 3\n", "b.json": b"{}",
            "c.seg.png": b"no image", "c.cls": b"0", "c.webp": b"C", "._a.jpg": b"junk of another system",
        }  # fmt: skip
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert found(path, index_tar(path)) == [("a", b"A", 3), ("c", b"C", 0)]


@pytest.mark.parametrize(
    ("files", "noun"),
    [
        ({"a.jpg": b"A"}, r"\.cls"),
        ({"a.cls": b"1"}, "image"),
        ({"a.jpg": b"A", "a.cls": b"cat"}, "label b'cat'"),
        ({"a.jpg": b"A", "a.cls": b"1" * 5000}, "label b'1{20}'"),
        ({"a.jpg": b"A", "a.cls": "٣".encode()}, "label"),
        ({"a.jpg": b"A", "a.JPG": b"A", "a.cls": b"1"}, r"a\.jpg"),
    ],
)
def test_index_names_unusable_samples(tmp_path, files, noun):
    with pytest.raises(FractalError, match=rf"a\.tar: .*{noun}") as error:
        index_tar(write_tar(tmp_path / "a.tar", files))
    assert "\n" not in str(error.value)


def test_index_refuses_images_that_readers_cannot_hold(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"AB", "a.cls": b"1", "b.jpg": b"ABC", "b.cls": b"1"})
    monkeypatch.setattr(webdataset_module, "MAX_SAMPLE_BYTES", 2)
    with pytest.raises(FractalError, match=r"a\.tar: b\.jpg"):
        index_tar(path)


def test_index_refuses_compressed_tars(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(3))
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(FractalError, match=r"a\.tar: .*decompress"):
        index_tar(path)


@pytest.mark.parametrize("length", [100, 2000, 4200])
def test_index_refuses_truncated_tars(tmp_path, length):
    path = write_tar(tmp_path / "a.tar", samples(5))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FractalError, match=r"a\.tar: "):
        index_tars([(path, 5)])


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    "data",
    [
        header("a.jpg", 0) + header("b.zip", -512, b"Z"),  # the header after b.zip is that of b.zip
        (header("././@LongLink", 5, tarfile.GNUTYPE_LONGNAME) + b"name\0" + bytes(507)) * 2000,
    ],
    ids=["negative size", "long names of long names"],
)
def test_index_refuses_tars_without_end(tmp_path, data):
    path = tmp_path / "a.tar"
    path.write_bytes(data + bytes(1024))
    with pytest.raises(FractalError, match=r"a\.tar: "):
        index_tar(path)


def test_index_does_not_read_huge_headers(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(header("././@LongLink", 4 << 30, tarfile.GNUTYPE_LONGNAME))
    os.truncate(path, 5 << 30)  # the name is a hole in the file
    with pytest.raises(FractalError, match=r"a\.tar: "):
        index_tar(path)


def test_index_opens_regular_files_only(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(FractalError, match=r"a\.tar: "):
        index_tar(tmp_path / "a.tar")


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
            index = index_tar(path)
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
    info = load_webdataset(folder)
    assert is_webdataset(folder)
    assert info.classes == 9
    assert info.splits["train"] == ((folder / "train-0000.tar", 3), (folder / "train-0001.tar", 2))
    assert [len(index) for index in index_tars(info.splits["train"])] == [3, 2]


@pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", "pipe:rm -rf x.tar"])
def test_load_webdataset_rejects_names_that_lead_out(tmp_path, name):
    folder = folder_of(tmp_path, {"train": [1]})
    info = json.loads((folder / "_info.json").read_text())
    info["splits"]["train"]["filenames"] = [name]
    (folder / "_info.json").write_text(json.dumps(info))
    with pytest.raises(FractalError, match=r"_info\.json"):
        load_webdataset(folder)


def test_cache_is_outside_of_the_folder(tmp_path, cache, monkeypatch, caplog):
    caplog.set_level("INFO")
    folder = folder_of(tmp_path, {"train": [3, 2, 4, 1, 2, 5]})  # so many that worker processes scan them
    before = sorted(os.listdir(folder))
    shards = load_webdataset(folder).splits["train"]
    first = index_tars(shards)
    monkeypatch.setattr(webdataset_module, "index_tar", lambda path: pytest.fail("scanned again"))
    again = index_tars(shards)
    assert [record.getMessage() for record in caplog.records] == [f"indexing 6 tars of {folder}, once"]
    assert index_digest(again) == index_digest(first)
    assert [again[0].key(number) for number in range(3)] == ["n000", "n001", "n002"]
    assert sorted(os.listdir(folder)) == before


def test_cache_of_a_changed_tar(tmp_path):
    folder = folder_of(tmp_path, {"train": [3]})
    shards = load_webdataset(folder).splits["train"]
    old = index_tars(shards)
    write_tar(folder / "train-0000.tar", {name: data + b"0" for name, data in samples(3).items()})
    assert index_digest(index_tars(shards)) != index_digest(old)


@pytest.mark.parametrize("damage", [b"PK garbage", b"\x93NUMPY"])
def test_cache_damaged_or_not_writable(tmp_path, cache, damage):
    folder = folder_of(tmp_path, {"train": [3]})
    shards = load_webdataset(folder).splits["train"]
    old = index_tars(shards)
    (kept,) = cache.rglob("*.npz")
    kept.write_bytes(damage)
    assert index_digest(index_tars(shards)) == index_digest(old)
    kept.unlink()
    kept.parent.rmdir()
    kept.parent.write_text("a file where the folder should be")
    assert index_digest(index_tars(shards)) == index_digest(old)


def test_index_checks_the_number_of_samples(tmp_path):
    folder = folder_of(tmp_path, {"train": [3]})
    with pytest.raises(FractalError, match=r"train-0000\.tar: "):
        index_tars([(folder / "train-0000.tar", 4)])
