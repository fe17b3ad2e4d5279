"""Packing the archives of ILSVRC2012, made here: the labels are torchvision's, and damaged archives are refused."""

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets.imagenet
from scipy.io import savemat

from damages import tar_header
from fractalshards.errors import FractalError
from fractalshards.image_files import DEVKIT, TRAIN, VAL, list_ilsvrc
from fractalshards.manifest import load_manifest
from packing import Encode, assert_refused, images, pack, run

pytestmark = pytest.mark.usefixtures("threads")
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


def tar_of(files: Files) -> bytes:
    parts = (tar_header(name, len(data)) + data + bytes(-len(data) % 512) for name, data in files.items())
    return b"".join(parts) + bytes(1024)


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
    return (tar_header("././@LongLink", 5, tarfile.GNUTYPE_LONGNAME) + b"name".ljust(512, b"\0")) * 5000


def sparse() -> bytes:
    """A tar of a file that takes no space and unpacks to a pebibyte, which no memory holds."""
    block = bytearray(tar_header("x/data/meta.mat", kind=tarfile.GNUTYPE_SPARSE))
    block[483:495] = b"\x80" + (1 << 50).to_bytes(11, "big")
    block[148:154] = b"%06o" % (sum(block[:148]) + 8 * ord(" ") + sum(block[156:]))
    return bytes(block)


@pytest.fixture
def archives(tmp_path: Path, image_file: Encode) -> Path:
    """The three archives, with four classes, of each one image more than its number."""
    folder = tmp_path / "ilsvrc"
    folder.mkdir()
    tars = {}
    for number, wnid, *_ in SYNSETS[:4]:
        members = {f"{wnid}_{i}.JPEG": image_file("JPEG", 20 + i, 30, 10 * number + i) for i in range(number + 1)}
        tars[f"{wnid}.tar"] = tar_of(members)
    (folder / TRAIN).write_bytes(tar_of(tars))
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(VAL_LABELS) + 1)]
    (folder / VAL).write_bytes(tar_of({name: image_file("JPEG", 25, 20, 100 + i) for i, name in enumerate(names)}))
    (folder / DEVKIT).write_bytes(devkit())
    return folder


def test_labels_are_those_of_torchvision(archives, tmp_path, monkeypatch):
    out = tmp_path / "out"
    pack(f"imagenet:{archives}", out, "--shard-size", "5")
    monkeypatch.setattr(torchvision.datasets.imagenet, "_verify_archive", lambda *_: None)
    for split in ("train", "val"):
        theirs = torchvision.datasets.ImageNet(str(archives), split)
        assert images(out, split) == {Path(path).read_bytes(): label for path, label in theirs.samples}
        assert theirs.wnids == IDS
    manifest = load_manifest(out)
    assert manifest.class_ids == tuple(IDS)
    assert manifest.class_names == ("tench, Tinca tinca", "crane", "kit fox, Vulpes macrotis", "crane")
    assert (manifest.classes, manifest.samples("train"), manifest.samples("val")) == (4, 14, 7)

    (out / "train-000001.tar").unlink()  # wherever the archives are, packing continues
    result = pack(f"imagenet:{archives.rename(tmp_path / 'moved')}", out, "--shard-size", "5")
    assert "to pack: 5 images" in result.stderr
    assert load_manifest(out).content_digest() == manifest.content_digest()


def test_val_is_the_archive_a_share_or_nothing(archives, tmp_path):
    pack(f"imagenet:{archives}", tmp_path / "share", "--split", "train=0.75,val=0.25")
    assert len(images(tmp_path / "share", "train")) == 10
    assert sorted(images(tmp_path / "share", "val").values()) == [0, 1, 2, 3]
    (archives / VAL).unlink()
    assert VAL in pack(f"imagenet:{archives}", tmp_path / "none").stderr
    assert list(load_manifest(tmp_path / "none").splits) == ["train"]


def train_of(name: str = "n01440764_1.JPEG", tar: str = "n01440764.tar", **header: Any) -> bytes:
    """A training archive with one image per class, of which the first class is as given."""
    first = tar_header(name, **{"size": 4, **header}) + b"data".ljust(512, b"\0") + bytes(1024)
    return tar_of({tar: first, **{f"{wnid}.tar": tar_of({f"{wnid}_1.JPEG": b"x"}) for wnid in IDS[1:]}})


def val_of(first: str, count: int = len(VAL_LABELS)) -> bytes:
    """A validation archive whose first image is called ``first``."""
    names = [first, *(f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(2, count + 1))]
    return tar_of(dict.fromkeys(names, b"x"))


WHOLE = train_of()


@pytest.mark.parametrize(
    ("archive", "data"),
    [
        *((TRAIN, train_of(kind=kind)) for kind in (tarfile.SYMTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE)),
        *((TRAIN, train_of(name)) for name in ("../n01440764_1.JPEG", "n02119789_1.JPEG", "", "n01440764_1.JPEG\n")),
        (TRAIN, train_of(tar="../n01440764.tar")),
        (TRAIN, train_of("n99999999_1.JPEG", "n99999999.tar")),
        *((TRAIN, train_of(size=size)) for size in (5000, -5)),
        (TRAIN, WHOLE[2560:]),  # the first class is missing
        (TRAIN, WHOLE[:1200]),
        (TRAIN, WHOLE[:2560] + WHOLE),  # the first class twice
        *((VAL, val_of(f"{name}.JPEG")) for name in ("ILSVRC2012_val_00000008", "ILSVRC2012_val_00000000",
          "../ILSVRC2012_val_00000001")),
        (VAL, val_of("ILSVRC2012_val_00000001.JPEG", 6)),
        *((DEVKIT, data) for data in (b"not gzip", devkit()[:300])),
        *((DEVKIT, gzip.compress(data)) for data in (b"not a tar" * 100, tar_of({"x/readme.txt": b""}),
          bytes(70 << 20), nested(), sparse(), tar_of({"x/data/meta.mat": b"junk" * 99,
          "x/data/ILSVRC2012_validation_ground_truth.txt": b""}))),
        (DEVKIT, devkit(labels=[1, 2, 6])),
        (DEVKIT, devkit(labels=b"1\n\xd9\xa1\n")),
        (DEVKIT, devkit(synsets=[*SYNSETS, SYNSETS[0]])),
        (DEVKIT, devkit(synsets=[(1, "../../x", "crane", 0), SYNSETS[1]])),
    ],
    ids=lambda value: value[-30:] if isinstance(value, str) else "",
)  # fmt: skip
def test_odd_archives_are_refused(archives, archive, data):
    (archives / TRAIN).write_bytes(WHOLE)
    (archives / VAL).write_bytes(val_of("ILSVRC2012_val_00000001.JPEG"))
    assert len(list_ilsvrc(archives, with_val=True).splits["val"].labels) == len(VAL_LABELS)
    (archives / archive).write_bytes(data)
    with pytest.raises(FractalError, match=rf"\A.*{archive}.*\Z"):  # one line
        list_ilsvrc(archives, with_val=True)


def test_listing_does_not_read_images(archives, tmp_path):
    """An image of 8 GiB that is a hole in the file costs nothing."""
    size = 8**11 - 512
    rest = tar_of({f"{wnid}.tar": tar_of({f"{wnid}_1.JPEG": b"x"}) for wnid in IDS[1:]})
    with (archives / TRAIN).open("wb") as file:
        file.write(tar_header("n01440764.tar", size + 1024) + tar_header("n01440764_1.JPEG", size))
        file.seek(1024 + size + 512)
        file.write(rest)
    assert list_ilsvrc(archives, with_val=False).splits["train"].labels.tolist() == [0, 1, 2, 3]
    assert_refused(run("pack", f"imagenet:{archives}", tmp_path / "out"), 1, f"{TRAIN}: n01440764_1.JPEG: ")
