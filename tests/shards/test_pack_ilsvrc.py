"""Packing the archives of ILSVRC2012 from tars made here: the labels that torchvision finds, and nothing hostile in."""

import gzip
import io
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets.imagenet
from click.testing import CliRunner, Result
from scipy.io import savemat

from fractalshards.cli import main
from fractalshards.manifest import load_manifest
from fractalshards.pack import DEVKIT, TRAIN, VAL, list_ilsvrc
from fractalshards.reader import index_split, iterate_shard
from fractalshards.sample import decode_label

# by their numbers in the devkit, which are not in the order of the ids; the last has children, so it is no class
SYNSETS = [
    (1, "n02119789", "kit fox, Vulpes macrotis", 0),
    (2, "n01440764", "tench, Tinca tinca", 0),
    (3, "n02126465", "crane", 0),
    (4, "n02012849", "crane", 0),
    (5, "n00001740", "entity", 3),
]
IDS = ["n01440764", "n02012849", "n02119789", "n02126465"]
VAL_LABELS = [3, 1, 4, 2, 2, 1, 3]
Files = dict[str, bytes]
Encode = Callable[..., bytes]


def tar_of(files: Files, form: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def devkit(synsets: list[tuple[Any, ...]] = SYNSETS, labels: object = VAL_LABELS) -> bytes:
    """``meta.mat`` as MATLAB writes the devkit's: a struct array of all synsets."""
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(number, wnid, words, "a gloss", children) for number, wnid, words, children in synsets]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kinds).reshape(-1, 1)})
    lines = "".join(f"{label}\n" for label in labels).encode() if isinstance(labels, list) else labels
    top = "ILSVRC2012_devkit_t12"
    files = {f"{top}/readme.txt": b"hello", f"{top}/data/meta.mat": meta.getvalue()}
    return gzip.compress(tar_of({**files, f"{top}/data/ILSVRC2012_validation_ground_truth.txt": lines}))


def nested() -> bytes:
    """A tar of nothing but headers that announce the long name of what follows."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 5
    return (header.tobuf(tarfile.GNU_FORMAT) + b"name".ljust(512, b"\0")) * 5000


def train_files(image_file: Encode) -> dict[str, Files]:
    """The images of every class by the name of its tar: as many as the class's number, one a PNG, one CMYK."""
    files: dict[str, Files] = {}
    for number, wnid, _, children in SYNSETS:
        for place in range(0 if children else number + 1):
            form, mode = ("PNG", "RGB") if place == 3 else ("JPEG", "CMYK" if place == 1 else "RGB")
            data = image_file(form, 20 + place, 30, 10 * number + place, mode)
            files.setdefault(f"{wnid}.tar", {})[f"{wnid}_{place}.JPEG"] = data
    return files


def val_files(image_file: Encode) -> Files:
    return {
        f"ILSVRC2012_val_{place + 1:08d}.JPEG": image_file("JPEG", 25, 20, 100 + place)
        for place in range(len(VAL_LABELS))
    }


def write(folder: Path, train: dict[str, Files], val: Files) -> Path:
    folder.mkdir()
    (folder / TRAIN).write_bytes(tar_of({name: tar_of(files) for name, files in train.items()}))
    (folder / VAL).write_bytes(tar_of(val))
    (folder / DEVKIT).write_bytes(devkit())
    return folder


@pytest.fixture
def archives(tmp_path: Path, image_file: Encode) -> Path:
    """The three archives, of four classes."""
    return write(tmp_path / "ilsvrc", train_files(image_file), val_files(image_file))


def pack(folder: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["pack", f"imagenet:{folder}", str(out), "--workers", "1", *options])


def packed_images(out: Path, split: str) -> dict[bytes, int]:
    samples = [one for shard in index_split(load_manifest(out), split) for one in iterate_shard(shard)]
    pairs = [(data, decode_label(one.files)) for one in samples for end, data in one.files.items() if end != "cls"]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_labels_are_those_of_torchvision(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = pack(archives, tmp_path / "out", "--shard-size", "5")
    assert result.exit_code == 0, result.output
    monkeypatch.setattr(torchvision.datasets.imagenet, "_verify_archive", lambda *_: None)
    for split in ("train", "val"):
        theirs = torchvision.datasets.ImageNet(str(archives), split)
        assert packed_images(tmp_path / "out", split) == {Path(p).read_bytes(): label for p, label in theirs.samples}
        assert theirs.wnids == IDS
    manifest = load_manifest(tmp_path / "out")
    assert manifest.class_ids == tuple(IDS)
    assert manifest.class_names == ("tench, Tinca tinca", "crane", "kit fox, Vulpes macrotis", "crane")
    assert (manifest.classes, manifest.samples("train"), manifest.samples("val")) == (4, 14, 7)
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--workers", "1"])
    assert result.exit_code == 0, result.output


def test_it_continues_and_moves(archives: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pack(archives, out, "--shard-size", "5").exit_code == 0
    digest = load_manifest(out).content_digest()
    (out / "train-000001.tar").unlink()
    result = pack(archives.rename(tmp_path / "moved"), out, "--shard-size", "5")
    assert "4 of them done; to pack: 5 images" in result.stderr
    assert load_manifest(out).content_digest() == digest


def test_without_the_validation_archive_there_is_no_val_and_that_is_said(archives: Path, tmp_path: Path) -> None:
    (archives / VAL).unlink()
    result = pack(archives, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"note: no {VAL} in {archives}, so no split val" in result.stderr
    assert list(load_manifest(tmp_path / "out").splits) == ["train"]


def test_a_share_of_train_can_be_val(archives: Path, tmp_path: Path) -> None:
    result = pack(archives, tmp_path / "out", "--split", "train=0.75,val=0.25")
    assert result.exit_code == 0, result.output
    train, val = packed_images(tmp_path / "out", "train"), packed_images(tmp_path / "out", "val")
    assert (len(train), sorted(val.values())) == (10, [0, 1, 2, 3])
    assert set(train.values()) == {0, 1, 2, 3}


def test_a_bad_image_is_named_by_its_tar_and_its_name(tmp_path: Path, image_file: Encode) -> None:
    train = train_files(image_file)
    train["n01440764.tar"]["n01440764_1.JPEG"] = b"not an image"
    result = pack(write(tmp_path / "in", train, val_files(image_file)), tmp_path / "out")
    assert result.exit_code == 1
    assert f"{TRAIN}: n01440764_1.JPEG: image cannot be decoded" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "_info.json").exists()


def special(kind: bytes) -> bytes:
    member = tarfile.TarInfo("n01440764_9.JPEG")
    member.type, member.linkname = kind, "/etc/passwd"
    return member.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
                                  tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])  # fmt: skip
def test_members_that_are_no_regular_files_are_refused(archives: Path, kind: bytes) -> None:
    (archives / TRAIN).write_bytes(tar_of({"n01440764.tar": special(kind) + bytes(1024)}))
    assert_refused(archives, "n01440764.tar: n01440764_9.JPEG: not a regular file")


@pytest.mark.parametrize(
    "name",
    [
        "../n01440764_1.JPEG",
        "/n01440764_1.JPEG",
        "n01440764_1.png",
        "n02119789_1.JPEG",
        "x/../n01440764_1.JPEG",
        "n01440764_1.JPEG\n",
        "n01440764_\u0661.JPEG",
        "",
    ],
)
def test_odd_names_of_training_images_are_refused(archives: Path, name: str) -> None:
    (archives / TRAIN).write_bytes(tar_of({"n01440764.tar": tar_of({name: b"x"})}))
    words = "belongs to another class" if name.startswith("n0211") else "is not the name of an image of the class"
    assert_refused(archives, words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../n01440764.tar", "is not the name of the tar of a class"),
        ("n01440764", "is not the name of the tar of a class"),
        ("n99999999.tar", f"holds class n99999999, which {DEVKIT} does not know"),
        ("n01440764.tar", "no images of class n02012849"),
    ],
)
def test_odd_tars_of_classes_are_refused(archives: Path, name: str, words: str) -> None:
    images = {name.replace("tar", "").strip("./") + "_1.JPEG": b"x"}
    (archives / TRAIN).write_bytes(tar_of({name: tar_of(images)}))
    assert_refused(archives, words)


@pytest.mark.parametrize("lie", ["inner", "outer", "negative", "huge", "cut", "garbage"])
def test_sizes_that_lie_and_damaged_headers_are_refused(archives: Path, lie: str) -> None:
    inner = tarfile.TarInfo("n01440764_1.JPEG")
    inner.size = {"inner": 5000, "negative": -5, "huge": 2**70}.get(lie, 4)
    header = inner.tobuf(tarfile.GNU_FORMAT)
    data = tar_of({"n01440764.tar": header + b"data".ljust(512, b"\0") + bytes(1024)})
    if lie == "outer":
        outer = tarfile.TarInfo("n01440764.tar")
        outer.size = 10**6
        data = outer.tobuf(tarfile.GNU_FORMAT) + data[512:]
    data = {"cut": data[:1200], "garbage": data[:700] + b"\xff" + data[701:]}.get(lie, data)
    (archives / TRAIN).write_bytes(data)
    words = {"garbage": "damaged tar header", "negative": "not a regular file"}.get(lie, "cut off")
    assert_refused(archives, words)


@pytest.mark.parametrize(
    ("val", "words"),
    [
        ({"ILSVRC2012_val_00000001.JPEG": b"x"}, "1 images, but"),
        ({"ILSVRC2012_val_00000008.JPEG": b"x"}, "has no label"),
        ({"ILSVRC2012_val_00000000.JPEG": b"x"}, "has no label"),
        ({"../ILSVRC2012_val_00000001.JPEG": b"x"}, "is not the name of a validation image"),
        ({"val/ILSVRC2012_val_00000001.JPEG": b"x"}, "is not the name of a validation image"),
    ],
)
def test_odd_validation_archives_are_refused(archives: Path, val: Files, words: str) -> None:
    (archives / VAL).write_bytes(tar_of(val))
    assert_refused(archives, words)


@pytest.mark.parametrize("archive", [TRAIN, VAL])
def test_what_is_there_twice_is_refused(archives: Path, archive: str) -> None:
    data = (archives / archive).read_bytes()
    first = data[: 512 + -(-tarfile.TarInfo.frombuf(data[:512], "ascii", "strict").size // 512) * 512]
    (archives / archive).write_bytes(first + data)
    assert_refused(archives, "is there twice")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"not gzip", "damaged"),
        (devkit()[:300], "damaged"),
        (gzip.compress(b"not a tar" * 100), "damaged"),
        (gzip.compress(tar_of({"x/readme.txt": b""})), "no data/meta.mat in it"),
        (gzip.compress(bytes(70 << 20)), "unpacks to more than 64 MiB"),
        (gzip.compress(tar_of({"x/data/meta.mat": b"junk" * 99, "x/data/ILSVRC2012_validation_ground_truth.txt": b""})),
         "data/meta.mat: damaged"),
        (gzip.compress(nested()), "damaged"),
        (devkit(labels=[1, 2, 6]), "'6' is not the number of a class"),
        (devkit(labels=b"1\n\xd9\xa1\n"), "is not the number of a class"),
        (devkit(synsets=[*SYNSETS, SYNSETS[0]]), "there twice"),
        (devkit(synsets=[(1, "../../x", "crane", 0), SYNSETS[1]]), "not named as synsets"),
    ],
    ids=range(11),
)  # fmt: skip
def test_odd_devkits_are_refused(archives: Path, data: bytes, words: str) -> None:
    (archives / DEVKIT).write_bytes(data)
    assert_refused(archives, words)


def assert_refused(archives: Path, words: str) -> None:
    out = archives.parent / "out"
    result = pack(archives, out)
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert line.count(str(archives)) == 1
    assert not out.exists()


def test_without_scipy_the_extra_is_named(archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    result = pack(archives, tmp_path / "out")
    assert result.exit_code == 1
    assert "needs scipy, which is not installed; run pip install '.[imagenet]'" in result.stderr


def test_an_archive_is_listed_without_reading_its_images(archives: Path, tmp_path: Path) -> None:
    """An image of 8 GiB that is a hole in the file costs nothing."""
    size = 8**11 - 512
    inner = tarfile.TarInfo("n01440764_1.JPEG")
    inner.size = size
    outer = tarfile.TarInfo("n01440764.tar")
    outer.size = size + 1024
    rest = tar_of({f"{wnid}.tar": tar_of({f"{wnid}_1.JPEG": b"x"}) for wnid in IDS[1:]})
    with (archives / TRAIN).open("wb") as file:
        file.write(outer.tobuf(tarfile.GNU_FORMAT) + inner.tobuf(tarfile.GNU_FORMAT))
        file.seek(1024 + size + 512)
        file.write(rest)
    listing = list_ilsvrc(archives, with_val=False)
    assert listing.parts["train"].labels.tolist() == [0, 1, 2, 3]
    result = pack(archives, tmp_path / "out")
    assert result.exit_code == 1
    assert f"{TRAIN}: n01440764_1.JPEG: larger than 64 MiB, too large for a sample" in result.stderr
