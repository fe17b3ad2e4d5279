"""Damaged and hostile datasets: ``HOSTILE`` maps the file at fault to named changes of a sound dataset."""

import hashlib
import io
import json
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fractalshards.manifest import INFO, RECIPE, SYSTEMS, read_record
from fractalshards.png import encode_png
from fractalshards.sample import END_OF_TAR, Sample, pack_sample, parse_sample

SHARD = "train-000001.tar"  # with the samples 5 to 9
SIDECAR = "train-000001.json"
KEY = "000000007"
MARK = Path("/tmp/made-by-a-hostile-dataset")
Damage = Callable[[Path], object]


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), data, offset)


def train_split(folder: Path) -> dict[str, Any]:
    split: dict[str, Any] = json.loads((folder / INFO).read_text())["splits"]["train"]
    return split


def edit_split(folder: Path, **changes: Any) -> None:
    edit(folder / INFO, splits={"train": train_split(folder) | changes})


def in_file(name: str, **changes: Any) -> Damage:
    return lambda folder: edit(folder / name, **changes)


def in_split(**changes: Any) -> Damage:
    return lambda folder: edit_split(folder, **changes)


def whole(name: str, content: str | bytes) -> Damage:
    """Replace the content of a file."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def replaced(name: str, make: Callable[[Path], object]) -> Damage:
    """Replace a file by something else."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def forged(change: Callable[[list[bytes]], list[bytes]], end: bytes = END_OF_TAR) -> Damage:
    """Change the samples of a shard, with the sizes, offsets and sha256 in sidecar and manifest to match."""

    def damage(folder: Path) -> None:
        offsets = read_record(folder, SHARD, "single").offsets
        data = (folder / SHARD).read_bytes()
        blocks = change([data[start:stop] for start, stop in pairwise(offsets)])
        tar = b"".join(blocks) + end
        (folder / SHARD).write_bytes(tar)
        sha256 = hashlib.sha256(tar).hexdigest()
        places = [0, *np.cumsum([len(block) for block in blocks]).tolist()]
        edit(folder / SIDECAR, offsets=places, bytes=len(tar), sha256=sha256)
        split = train_split(folder)
        edit_split(folder, bytes=[split["bytes"][0], len(tar)], sha256=[split["sha256"][0], sha256])

    return damage


def third(change: Callable[[bytes], bytes]) -> Damage:
    """Change the blocks of sample 000000007."""
    return forged(lambda blocks: [*blocks[:2], change(blocks[2]), *blocks[3:]])


def tar_header(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, **fields: Any) -> bytes:
    header = tarfile.TarInfo(name)
    for field, value in {"size": size, "type": kind, **fields}.items():
        setattr(header, field, value)
    return header.tobuf(tarfile.GNU_FORMAT)


def member(kind: bytes, **fields: Any) -> Damage:
    """Change the image of sample 000000007 to another type of tar member."""
    return third(lambda blocks: tar_header(**{"name": f"{KEY}.png", "kind": kind, **fields}) + blocks[-1024:])


def with_files(**files: bytes) -> Damage:
    """Change or add files of sample 000000007."""
    return third(lambda blocks: pack_sample(Sample(KEY, {**parse_sample(blocks).files, **files})))


def png(width: int, height: int, rows: bytes, *chunks: tuple[bytes, bytes], color: int = 2) -> bytes:
    """Make a PNG of eight bits per value of a colour type, whose header may not match the size of its rows."""
    header = struct.pack(">II5B", width, height, 8, color, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")):
        parts += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(kind + data))]
    return b"".join(parts)


def npz(array: bytes, compression: int = zipfile.ZIP_STORED) -> Damage:
    """Replace the systems by one array."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("00000.npy", array)
    return whole(SYSTEMS, buffer.getvalue())


def npy(array: np.ndarray, pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=pickle)
    return buffer.getvalue()


class Touch:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARK}",)


def no_samples_in_a_device(folder: Path) -> None:
    replaced(SHARD, endless)(folder)
    size = (folder / "train-000000.tar").stat().st_size
    edit_split(folder, bytes=[size, 0], shard_lengths=[5, 0], num_samples=5)
    edit(folder / SIDECAR, bytes=0, samples=0, offsets=[0], label_counts=[])


def without_the_last_sample(folder: Path) -> None:
    offsets = json.loads((folder / SIDECAR).read_text())["offsets"]
    edit(folder / SIDECAR, samples=4, label_counts=[2, 1, 1], offsets=offsets[:-1])


DEEP = "[" * 500 + "]" * 500
TIMM = {"splits": {"train": {"name": "train", "num_samples": 1, "filenames": ["a.tar"], "shard_lengths": [1]}}}
SMALL = encode_png(np.zeros((16, 16, 3), np.uint8))
JPEG = io.BytesIO()
Image.new("RGB", (16, 16)).save(JPEG, "JPEG")
LONG = npy(np.zeros((1, 2, 3))).replace(b"(1, 2, 3), }          ", b"(10000000000, 2, 3), }")


def copied(folder: Path) -> None:
    """Replace the second shard by the first, with matching sidecar and manifest."""
    for end in ("tar", "json"):
        shutil.copy(folder / f"train-000000.{end}", folder / f"train-000001.{end}")
    edit(folder / SIDECAR, name=SHARD)
    split = train_split(folder)
    edit_split(folder, **{name: split[name][:1] * 2 for name in ("bytes", "sha256", "content_digests")})


MANIFESTS: dict[str, Damage] = {
    "name with a pipe": in_split(filenames=[f"pipe:touch {MARK}", SHARD]),
    "name of a megabyte": in_split(filenames=["../" * 350_000, SHARD]),
    **{
        f"name {name!r}": in_split(filenames=[name, SHARD])
        for name in ("../train-000000.tar", "", "recipe.tar", "train-000000.json", "val-000000.tar", f"{SHARD}\n")
    },
    "shard twice": in_split(filenames=[SHARD, SHARD]),
    "split that leads out": lambda folder: edit(folder / INFO, splits={"../train": train_split(folder)}),
    "negative count": in_split(shard_lengths=[5, -5]),
    "truth for a count": in_split(shard_lengths=[5, True]),
    "more than 64 bits": in_split(bytes=[10**30, 5]),
    "lists for a count": in_split(bytes=[[[]], 5]),
    "list too short": in_split(shard_lengths=[5]),
    "sum that is wrong": in_split(num_samples=11),
    "first samples that overlap": in_split(first_samples=[0, 4]),
    "text for the recipe": in_file(INFO, recipe="x"),
    "no classes": in_file(INFO, classes=0),
    "10^15 classes": in_file(INFO, classes=10**15),
    "names for some classes": in_file(INFO, class_names=["one", "two"]),
    "later version": in_file(INFO, format_version=99),
    "unknown label type": in_file(INFO, label_type="other"),
    "10 MB of digits": whole(INFO, '{"format_version": ' + "9" * 10_000_000 + "}"),
    "10 MB of quotes": whole(INFO, '"' + '\\"' * 5_000_000),
    "20 MB": whole(INFO, " " * 20_000_000),
    "of timm alone": whole(INFO, json.dumps(TIMM)),
}
SIDECARS: dict[str, Damage] = {
    "offsets that overlap": in_file(SIDECAR, offsets=[0, 2048, 1024, 4096, 5120, 6144]),
    "offsets beyond the file": in_file(SIDECAR, offsets=[0, 512, 1024, 1536, 2048, 10**9]),
    "offsets that skip a sample": in_file(SIDECAR, offsets=[512, 1024, 1536, 2048, 2560, 3072]),
    "10^12 samples": in_file(SIDECAR, samples=10**12),
    "a sample of 100 MB": in_file(SIDECAR, offsets=[0, 1, 2, 3, 4, 10**8], bytes=10**8),
}
SHARDS: dict[str, Damage] = {
    "a sample left out": without_the_last_sample,
    "other counts": in_file(SIDECAR, label_counts=[1, 2, 2]),
    "other sha256": in_file(SIDECAR, sha256="0" * 64),
    "other content": in_file(SIDECAR, content_digest="0" * 32),
    "samples in another order": forged(lambda b: [*b[:2], b[3], b[2], b[4]]),
    "sample twice": forged(lambda b: [*b[:2], b[1], *b[3:]]),
    "two samples in one": forged(lambda blocks: [b"".join(blocks[:2]), *blocks[1:]]),
    "no end": forged(lambda blocks: blocks, end=b""),
    "garbage after the end": forged(list, end=END_OF_TAR + b"x"),
    "wrong label": with_files(cls=b"0"),
    "more rows than said": with_files(png=png(16, 16, bytes(20 << 20))),
    "cut off": lambda folder: os.truncate(folder / SHARD, 3000),
    "missing": lambda folder: (folder / SHARD).rename(folder / "train-000009.tar"),
    "another shard": copied,
    "pipe for a shard": replaced(SHARD, os.mkfifo),
    "device for a shard": no_samples_in_a_device,
    "folder": member(tarfile.DIRTYPE, name="../x"),
    "name that leads out": member(tarfile.REGTYPE, name="../../x.png"),
    "end in the middle": third(lambda blocks: END_OF_TAR + blocks),
    "escapes in a name": third(lambda blocks: b"\x1b[2J\n" + blocks[5:]),
    "a name that is no text": third(lambda blocks: b"\xff" * 512 + blocks[512:]),
}
SAMPLES: dict[str, Damage] = {
    "link": member(tarfile.SYMTYPE, linkname="/etc/passwd"),
    "sparse file": member(tarfile.GNUTYPE_SPARSE),
    "extended header": member(tarfile.XHDTYPE),
    "10 GB claimed": member(tarfile.REGTYPE, size=10 << 30),
    "negative size": member(tarfile.REGTYPE, size=-1),
    "file too many": with_files(txt=b"x"),
    "two labels": with_files(json=b"{}"),
    "every file twice": third(lambda blocks: 2 * blocks),
    "no image": third(lambda _: pack_sample(Sample(KEY, {"cls": b"1"}))),
    "label of another type": in_file(INFO, label_type="multi"),
    "label out of range": with_files(cls=b"3"),
    "label of 5000 digits": with_files(cls=b"1" * 5000),
    "label before image": third(lambda b: pack_sample(Sample(KEY, dict(reversed(parse_sample(b).files.items()))))),
    "4 billion pixels": with_files(png=png(65_000, 65_000, b"")),
    "no pixels": with_files(png=png(0, 16, b"")),
    "text of 20 MB": with_files(png=png(16, 16, bytes(784), (b"zTXt", b"a\0\0" + zlib.compress(bytes(20 << 20))))),
    "2000 chunks": with_files(png=SMALL + bytes(12 * 2000)),
    "flipped bit": with_files(png=SMALL[:60] + b"\xff" + SMALL[61:]),
    "JPEG called PNG": with_files(png=JPEG.getvalue()),
    "program for an image": with_files(png=b"%!PS-Adobe-3.0 EPSF-3.0\n"),
    "other size": with_files(png=png(17, 16, bytes(832))),
}
SYSTEMS_FILES: dict[str, Damage] = {
    "bomb of bzip2": npz(bytes(10**7), zipfile.ZIP_BZIP2),
    "program for systems": npz(npy(np.array([Touch()]), True)),
    "systems of other shape": npz(npy(np.zeros((2, 6)))),
    "systems of no bytes": npz(npy(np.zeros(9, "S0"))),
    "systems longer than they are": npz(LONG),
    "text for systems": npz(b"systems"),
    "header of systems cut off": npz(b"\x93NUMPY\1\0\1\0("),
    "other systems": npz(npy(np.zeros((2, 2, 3)))),
    "not a zip file": whole(SYSTEMS, b"PK\x03\x04"),
    "no systems": lambda folder: (folder / SYSTEMS).unlink(),
}
RECIPES: dict[str, Damage] = {
    "lists in the recipe": whole(RECIPE, f'{{"recipe": {{"a": {DEEP}}}, "recipe_digest": ""}}'),
    "other recipe": whole(RECIPE, '{"recipe": {"n": 11}, "recipe_digest": ""}'),
}
HOSTILE = {
    INFO: MANIFESTS,
    SIDECAR: SIDECARS,
    SHARD: SHARDS,
    f"{SHARD}: {KEY}: ": SAMPLES,
    SYSTEMS: SYSTEMS_FILES,
    RECIPE: RECIPES,
    "x.tar": {"stray tar": lambda folder: (folder / "x.tar").touch()},
}
ODD = {"folder": Path.mkdir, "pipe": os.mkfifo, "device": endless}
for _name in (INFO, SIDECAR, SYSTEMS, RECIPE):
    HOSTILE[_name] |= {f"{odd} for {_name}": replaced(_name, make) for odd, make in ODD.items()}
