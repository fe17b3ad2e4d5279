"""What can be done to a sound dataset, and what ``info``, ``verify`` and ``sheet`` say of it."""

import hashlib
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fractalshards.manifest import INFO, RECIPE, SYSTEMS, read_record
from fractalshards.png import encode_png
from fractalshards.sample import END_OF_TAR, Sample, pack_sample, parse_sample

SHARD = "train-000001.tar"  # with the samples 5 to 9
SIDECAR = "train-000001.json"
KEY = "000000007"
MARK = Path("/tmp/made-by-a-hostile-dataset")
Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """What is done to a dataset, the commands that fail then, and words of what they say."""

    name: str
    damage: Damage
    words: str
    failing: tuple[str, ...]


def everywhere(name: str, damage: Damage, words: str) -> Case:
    return Case(name, damage, words, ("info", "verify", "sheet"))


def reading(name: str, damage: Damage, words: str) -> Case:
    return Case(name, damage, words, ("verify", "sheet"))


def verifying(name: str, damage: Damage, words: str) -> Case:
    return Case(name, damage, words, ("verify",))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def in_manifest(**changes: Any) -> Damage:
    """Other fields of the manifest or of its split."""

    def damage(folder: Path) -> None:
        info = json.loads((folder / INFO).read_text())
        for name, value in changes.items():
            split = info["splits"]["train"]
            (split if name in split else info)[name] = value
        (folder / INFO).write_text(json.dumps(info))

    return damage


def in_sidecar(**changes: Any) -> Damage:
    return lambda folder: edit(folder / SIDECAR, **changes)


def whole(name: str, content: str | bytes) -> Damage:
    """Another content of a file."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def replaced(name: str, make: Callable[[Path], object]) -> Damage:
    """Something else in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def forged(change: Callable[[list[bytes]], list[bytes]], end: bytes = END_OF_TAR) -> Damage:
    """Other samples in a shard, with sizes, offsets and sha256 that fit in sidecar and manifest."""

    def damage(folder: Path) -> None:
        offsets = read_record(folder, SHARD, "single").offsets
        data = (folder / SHARD).read_bytes()
        blocks = change([data[start:stop] for start, stop in pairwise(offsets)])
        tar = b"".join(blocks) + end
        (folder / SHARD).write_bytes(tar)
        sha256 = hashlib.sha256(tar).hexdigest()
        places = [0, *np.cumsum([len(block) for block in blocks]).tolist()]
        edit(folder / SIDECAR, offsets=places, bytes=len(tar), sha256=sha256)
        split = json.loads((folder / INFO).read_text())["splits"]["train"]
        in_manifest(bytes=[split["bytes"][0], len(tar)], sha256=[split["sha256"][0], sha256])(folder)

    return damage


def third(change: Callable[[bytes], bytes]) -> Damage:
    """Other blocks of the sample 000000007."""
    return forged(lambda blocks: [*blocks[:2], change(blocks[2]), *blocks[3:]])


def member(kind: bytes, **fields: Any) -> Damage:
    """Another kind of image in the sample 000000007."""
    header = tarfile.TarInfo(f"{KEY}.png")
    header.type = kind
    for name, value in fields.items():
        setattr(header, name, value)
    return third(lambda blocks: header.tobuf(tarfile.GNU_FORMAT) + blocks[-1024:])


def with_files(**files: bytes) -> Damage:
    """Other files in the sample 000000007."""
    return third(lambda blocks: pack_sample(Sample(KEY, {**parse_sample(blocks).files, **files})))


def with_image(image: bytes) -> Damage:
    return with_files(png=image)


def label_first(blocks: bytes) -> bytes:
    return pack_sample(Sample(KEY, dict(reversed(parse_sample(blocks).files.items()))))


def png(width: int, height: int, inflated: bytes, extra: bytes = b"") -> bytes:
    """A PNG whose header may say another size than its rows have, with the text in ``extra``."""
    chunks = [
        (b"IHDR", struct.pack(">II5B", width, height, 8, 2, 0, 0, 0)),
        (b"zTXt", b"a\0\0" + zlib.compress(extra)),
        (b"IDAT", zlib.compress(inflated, 1)),
        (b"IEND", b""),
    ]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def npz(array: bytes, compression: int = zipfile.ZIP_STORED) -> Damage:
    """Another array of systems."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("00000.npy", array)
    return whole(SYSTEMS, buffer.getvalue())


def npy(array: np.ndarray, pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=pickle)
    return buffer.getvalue()


class Touch:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARK}",)


def no_samples_in_a_device(folder: Path) -> None:
    replaced(SHARD, endless)(folder)
    size = (folder / "train-000000.tar").stat().st_size
    in_manifest(bytes=[size, 0], shard_lengths=[5, 0], num_samples=5)(folder)
    edit(folder / SIDECAR, bytes=0, samples=0, offsets=[0], label_counts=[])


def without_the_last_sample(folder: Path) -> None:
    offsets = json.loads((folder / SIDECAR).read_text())["offsets"]
    edit(folder / SIDECAR, samples=4, label_counts=[2, 1, 1], offsets=offsets[:-1])


DEEP = "[" * 500 + "]" * 500
TIMM = {"splits": {"train": {"name": "train", "num_samples": 1, "filenames": ["a.tar"], "shard_lengths": [1]}}}
SMALL = encode_png(np.zeros((16, 16, 3), np.uint8))
LONG = npy(np.zeros((1, 2, 3))).replace(b"(1, 2, 3), }          ", b"(10000000000, 2, 3), }")
MANIFESTS = [
    everywhere("name with a pipe", in_manifest(filenames=[f"pipe:touch {MARK}", SHARD]), "is not a plain file name"),
    everywhere("name of a megabyte", in_manifest(filenames=["../" * 350_000, SHARD]), "_info.json: '../../"),
    everywhere("4000 digits", in_manifest(shard_lengths=[10**4000, 5]), "shard_lengths is not a count: '1000"),
    everywhere("more than 64 bits", in_manifest(bytes=[10**30, 5]), "bytes is not a count: '1000"),
    everywhere("lists for a count", in_manifest(bytes=[[[]], 5]), "bytes is not a count: list"),
    everywhere("lists for text", in_manifest(sha256=[[], []]), "sha256 is not a list of texts"),
    everywhere("object for a list", in_manifest(filenames={}), "filenames is missing or not a list"),
    everywhere("split that leads out", in_manifest(splits={"../train": {}}), "'../train' is not a plain file name"),
    everywhere("text for a split", in_manifest(splits={"train": "x"}), "train: expected a JSON object, found str"),
    everywhere("recipe 500 deep", in_manifest(recipe={"a": json.loads(DEEP)}), "recipe is nested more than 32 deep"),
    everywhere("recipe of 2000 values", in_manifest(recipe={"a": [[]] * 2000}), "recipe has more than 1,000 values"),
    everywhere("infinite number", whole(INFO, '{"recipe": {"n": 1e999}}'), "not valid JSON (1e999 is too large)"),
    everywhere("100 kB of lists", whole(INFO, "[" + "[]," * 35_000 + "[]]"), "expected a JSON object, found list"),
    everywhere(
        "10 MB of digits", whole(INFO, '{"format_version": ' + "9" * 10_000_000 + "}"), "not valid JSON (Exceeds"
    ),
    everywhere("10 MB of nesting", whole(INFO, "[" * 10_000_000), "not valid JSON (maximum recursion depth"),
    everywhere("20 MB", whole(INFO, " " * 20_000_000), "larger than 16 MiB"),
    everywhere("not UTF-8", whole(INFO, b"\xff\xfe\xfd"), "not valid JSON"),
    everywhere("of timm alone", whole(INFO, json.dumps(TIMM)), "the info file of a WebDataset by other software"),
    everywhere("pipe for the manifest", replaced(INFO, os.mkfifo), f"no {INFO}"),
    everywhere("device for the manifest", replaced(INFO, endless), f"no {INFO}"),
]
SIDECARS = [
    reading("offsets that overlap", in_sidecar(offsets=[0, 2048, 1024, 4096, 5120, 6144]), "the offsets do not fit"),
    reading("offsets beyond the file", in_sidecar(offsets=[0, 512, 1024, 1536, 2048, 10**9]), "the offsets do not fit"),
    reading(
        "offsets that skip a sample", in_sidecar(offsets=[512, 1024, 1536, 2048, 2560, 3072]), "offsets do not fit"
    ),
    reading("10^12 samples", in_sidecar(samples=10**12), f"{SIDECAR}: the offsets do not fit 1000000000000 samples"),
    reading("a sample of 100 MB", in_sidecar(offsets=[0, 1, 2, 3, 4, 10**8], bytes=10**8), "64 MiB is the most"),
    reading("fractions", in_sidecar(offsets=[0.5]), f"{SIDECAR}: offsets is not a count: '0.5'"),
    reading("lists for counts", in_sidecar(label_counts=[[]] * 1000), "label_counts is not a count: list"),
    verifying("a sample left out", without_the_last_sample, f"{SHARD}: the tar does not end after its last sample"),
    verifying("other counts", in_sidecar(label_counts=[1, 2, 2]), "the labels are not those that the sidecar counts"),
    verifying(
        "more classes", in_sidecar(label_counts=[2, 2, 1, 0]), "the labels are not those that the sidecar counts"
    ),
    reading("folder for a sidecar", replaced(SIDECAR, Path.mkdir), f"{SIDECAR}: not a regular file"),
    reading("pipe for a sidecar", replaced(SIDECAR, os.mkfifo), f"{SIDECAR}: not a regular file"),
    reading("device for a sidecar", replaced(SIDECAR, endless), f"{SIDECAR}: not a regular file"),
]
SHARDS = [
    reading("link", member(tarfile.SYMTYPE, linkname="/etc/passwd"), f"{KEY}.png: not a regular file"),
    reading("hard link", member(tarfile.LNKTYPE, linkname=RECIPE), f"{KEY}.png: not a regular file"),
    reading("device", member(tarfile.CHRTYPE, devmajor=1, devminor=5), f"{KEY}.png: not a regular file"),
    reading("sparse file", member(tarfile.GNUTYPE_SPARSE), f"{KEY}.png: not a regular file"),
    reading("extended header", member(tarfile.XHDTYPE), f"{KEY}.png: not a regular file"),
    reading("folder", member(tarfile.DIRTYPE, name="../x"), "../x: not a regular file"),
    reading(
        "10 GB claimed", member(tarfile.REGTYPE, size=10 << 30), f"{KEY}.png: cut off, 10,737,418,240 bytes promised"
    ),
    reading("negative size", member(tarfile.REGTYPE, size=-1), f"{KEY}.png: not a regular file"),
    reading("name that leads out", member(tarfile.REGTYPE, name="../../x.png"), "expected the members of one sample"),
    reading("end in the middle", third(lambda blocks: END_OF_TAR + blocks), "damaged tar header: end of file header"),
    reading("one sample in two", third(lambda blocks: blocks + blocks), f"{KEY}: a file stands twice in one sample"),
    reading(
        "two samples in one", forged(lambda blocks: [b"".join(blocks[:2]), *blocks[1:]]), "the members of one sample"
    ),
    reading("file too many", with_files(txt=b"x"), f"{SHARD}: {KEY}: expected one image, found ['png', 'txt']"),
    reading("two labels", with_files(json=b"{}"), f"{SHARD}: {KEY}: expected one label"),
    reading(
        "no image", third(lambda _: pack_sample(Sample(KEY, {"cls": b"1"}))), f"{SHARD}: {KEY}: expected one image"
    ),
    reading("label out of range", with_files(cls=b"3"), f"{SHARD}: {KEY}: label 3, but there are 3 classes"),
    reading(
        "label of 5000 digits", with_files(cls=b"1" * 5000), f"{SHARD}: {KEY}: label b'11111111111111111111' is not"
    ),
    reading("label that is code", with_files(cls=b"print()"), f"{SHARD}: {KEY}: label b'print()' is not a class index"),
    verifying("wrong label", with_files(cls=b"0"), f"{SHARD}: content digest differs"),
    verifying("label before image", third(label_first), f"{SHARD}: {KEY}: the label stands before the .png"),
    verifying("samples in another order", forged(lambda b: [*b[:2], b[3], b[2], b[4]]), f"expected sample {KEY} here"),
    verifying("sample twice", forged(lambda b: [*b[:2], b[1], *b[3:]]), f"expected sample {KEY} here"),
    verifying("no end", forged(lambda blocks: blocks, end=b""), f"{SHARD}: the tar does not end after its last"),
    verifying("half an end", forged(lambda blocks: blocks, end=bytes(512)), f"{SHARD}: the tar does not end after"),
    verifying("garbage after the end", forged(list, end=END_OF_TAR + b"x"), f"{SHARD}: the tar does not end after"),
    reading("cut off", lambda folder: os.truncate(folder / SHARD, 3000), f"{SHARD}: 3000 bytes instead of"),
    reading("pipe for a shard", replaced(SHARD, os.mkfifo), f"{SHARD}: not a regular file"),
    reading("device for a shard", no_samples_in_a_device, f"{SHARD}: not a regular file"),
    verifying("stray tar", lambda folder: (folder / "x.tar").touch(), "x.tar: not in the manifest; remove it"),
]
IMAGES = [
    reading("4 billion pixels", with_image(png(65_000, 65_000, b"")), f"{SHARD}: {KEY}: image cannot be decoded"),
    reading("100 million pixels", with_image(png(10_000, 10_000, b"")), f"{SHARD}: {KEY}: image claims 10000 x 10000"),
    reading("no pixels", with_image(png(0, 16, b"")), f"{SHARD}: {KEY}: image cannot be decoded"),
    verifying("rows missing", with_image(png(16, 16, bytes(49))), f"{SHARD}: content digest differs"),
    reading("text of 20 MB", with_image(png(16, 16, bytes(784), bytes(20 << 20))), f"{SHARD}: {KEY}: image cannot be"),
    reading(
        "2000 chunks", with_image(SMALL + bytes(12 * 2000)), f"{KEY}: image cannot be decoded: more than 1,000 chunks"
    ),
    reading("truncated image", with_image(SMALL[:-30]), f"{SHARD}: {KEY}: image cannot be decoded"),
    reading("flipped bit", with_image(SMALL[:60] + b"\xff" + SMALL[61:]), f"{SHARD}: {KEY}: image cannot be decoded"),
    reading(
        "program for an image", with_image(b"%!PS-Adobe-3.0 EPSF-3.0\n"), f"{SHARD}: {KEY}: image cannot be decoded"
    ),
    verifying("more rows than said", with_image(png(16, 16, bytes(20 << 20))), f"{SHARD}: content digest differs"),
    verifying("other size", with_image(png(17, 16, bytes(832))), f"{SHARD}: {KEY}: 17 x 16 pixels, not 16 x 16"),
]
OTHERS = [
    verifying(
        "bomb of bzip2", npz(bytes(10**7), zipfile.ZIP_BZIP2), f"{SYSTEMS}: damaged (neither stored nor deflated)"
    ),
    verifying(
        "program for systems", npz(npy(np.array([Touch()]), True)), f"{SYSTEMS}: damaged (Object arrays cannot be"
    ),
    verifying("systems of other shape", npz(npy(np.zeros((2, 6)))), f"{SYSTEMS}: damaged (an array of float64 (2, 6)"),
    verifying("systems of no bytes", npz(npy(np.zeros(9, "S0"))), f"{SYSTEMS}: damaged (an array of"),
    verifying("systems longer than they are", npz(LONG), f"{SYSTEMS}: damaged ("),
    verifying("pipe for systems", replaced(SYSTEMS, os.mkfifo), f"{SYSTEMS}: not a regular file"),
    verifying("no systems", replaced(SYSTEMS, str), f"{SYSTEMS} is missing"),
    verifying("list for the recipe", whole(RECIPE, "[]"), f"{RECIPE}: expected a JSON object, found list"),
    verifying(
        "lists in the recipe", whole(RECIPE, f'{{"recipe": {{"a": {DEEP}}}}}'), "recipe is nested more than 32 deep"
    ),
    verifying("device for the recipe", replaced(RECIPE, endless), f"{RECIPE}: not a regular file"),
]
