"""Shards: what is written is a plain POSIX tar that others read, and that says where each sample lies."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fractalshards import writer
from fractalshards.errors import FractalError
from fractalshards.manifest import finished_record, load_manifest, read_record
from fractalshards.png import decode_image, encode_png
from fractalshards.reader import index_split, iterate_shard
from fractalshards.sample import Sample, _pack_header, _parse_header, decode_label, pack_sample, parse_sample
from fractalshards.writer import write_shard

Encode = Callable[[np.ndarray], bytes]


def test_members_are_ustar_without_time_or_owner(dataset: Path) -> None:
    with tarfile.open(dataset / "train-000001.tar") as tar:
        members = tar.getmembers()
    expected = [f"{key:09d}.{extension}" for key in range(5, 10) for extension in ("png", "cls")]
    assert [member.name for member in members] == expected
    assert all((m.mtime, m.uid, m.gid, m.mode, m.type) == (0, 0, 0, 0o644, tarfile.REGTYPE) for m in members)
    assert (dataset / "train-000001.tar").read_bytes()[257:265] == b"ustar\x0000"


def test_the_webdataset_library_reads_the_same_samples(dataset: Path) -> None:
    index = index_split(load_manifest(dataset), "train")
    ours = [sample for shard in index for sample in iterate_shard(shard)]
    urls = [str(shard.path) for shard in index]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in theirs] == [sample.key for sample in ours]
    for a, b in zip(ours, theirs, strict=True):
        assert np.array_equal(decode_image(a.files["png"]), b["png"])
        assert decode_label(a.files) == b["cls"]


def test_the_record_tells_where_samples_lie(dataset: Path) -> None:
    record = read_record(dataset, "train-000000.tar", "single")
    data = (dataset / record.name).read_bytes()
    keys = [parse_sample(data[a:b]).key for a, b in zip(record.offsets, record.offsets[1:], strict=False)]
    assert keys == [f"{key:09d}" for key in range(5)]
    assert (record.samples, record.bytes, record.label_counts) == (5, len(data), (2, 2, 1))


def test_the_content_digest_sees_samples_and_not_their_encoding(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)

    def digest(name: str, key: str, pixels: np.ndarray, label: int, encode: Encode = encode_png) -> tuple[str, str]:
        record = write_shard(tmp_path, name, 3, [(key, (pixels, label))], encode)
        return record.content_digest, record.sha256

    def encode_with_pillow(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    content, sha256 = digest("a.tar", "000000000", image, 1)
    assert digest("b.tar", "000000000", image, 1) == (content, sha256)
    recoded = digest("c.tar", "000000000", image, 1, encode=encode_with_pillow)
    assert recoded[0] == content
    assert recoded[1] != sha256
    for other in (("000000001", image, 1), ("000000000", image ^ 1, 1), ("000000000", image, 2)):
        assert digest("d.tar", *other)[0] != content


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def samples():
        yield "000000000", (np.zeros((4, 4, 3), np.uint8), 0)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        write_shard(tmp_path, "train-000000.tar", 1, samples())
    assert list(tmp_path.iterdir()) == []
    assert caught.value.filename == str(tmp_path / "train-000000.tar")


def test_what_readers_would_refuse_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_SAMPLE_BYTES", 1 << 20)
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    with pytest.raises(FractalError, match=r"a sample of 1,4.* bytes, but it may have 1 MiB at most"):
        write_shard(tmp_path, "train-000000.tar", 3, [("000000000", (noise, 0))])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["no sidecar", "other size", "not JSON", "wrong counts", "offsets out of order"])
def test_a_tar_without_a_valid_sidecar_is_unfinished(dataset: Path, damage: str) -> None:
    name = "train-000000.tar"
    sidecar = dataset / "train-000000.json"
    fields = json.loads(sidecar.read_text())
    assert finished_record(dataset, name, "single") is not None
    if damage == "no sidecar":
        sidecar.unlink()
    elif damage == "other size":
        with (dataset / name).open("ab") as file:
            file.write(b"\0")
    elif damage == "not JSON":
        sidecar.write_text(sidecar.read_text()[:-20])
    elif damage == "wrong counts":
        sidecar.write_text(json.dumps({**fields, "samples": 4}))
    else:
        fields["offsets"][1:3] = fields["offsets"][2:0:-1]
        sidecar.write_text(json.dumps(fields))
    assert finished_record(dataset, name, "single") is None


@given(st.text("0123456789.abc", max_size=100), st.integers(0, 8**11 - 1))
def test_headers_are_those_of_tarfile(name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    assert _pack_header(name.encode(), size) == member.tobuf(tarfile.USTAR_FORMAT)


@given(
    st.text("0123456789.abc", min_size=1, max_size=100),
    st.integers(0, 8**11 - 1),
    st.integers(0, 511),
    st.integers(0, 255),
    st.booleans(),
)
def test_headers_are_read_as_tarfile_reads_them(name: str, size: int, place: int, byte: int, mended: bool) -> None:
    block = bytearray(_pack_header(name.encode(), size))
    block[place] = byte
    if mended:
        block[148:154] = b"%06o" % (sum(block[:148]) + 8 * ord(" ") + sum(block[156:]))
    try:
        member = tarfile.TarInfo.frombuf(bytes(block), "utf-8", "strict")
        expected = (member.name, member.size) if member.type in (b"0", b"\0") and member.size >= 0 else None
    except (tarfile.HeaderError, UnicodeDecodeError):
        expected = None
    try:
        assert _parse_header(bytes(block)) == expected
    except FractalError:
        assert expected is None


def test_samples_with_headers_of_others_are_read() -> None:
    packed = b""
    for extension, data in (("png", b"x" * 700), ("cls", b"3")):
        member = tarfile.TarInfo(f"000000001.{extension}")
        member.size, member.mtime, member.uname = len(data), 1_700_000_000, "somebody"
        packed += member.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)
    assert parse_sample(packed) == Sample("000000001", {"png": b"x" * 700, "cls": b"3"})


def test_what_does_not_fit_into_a_header_is_refused() -> None:
    for name, size in ((b"a" * 101, 1), (b"a", 8**11)):
        with pytest.raises(ValueError, match="does not fit"):
            _pack_header(name, size)


def test_a_sample_is_its_members_and_nothing_else() -> None:
    sample = Sample("000000001", {"png": b"x" * 700, "cls": b"3"})
    packed = pack_sample(sample)
    assert parse_sample(packed) == sample
    with pytest.raises(FractalError, match="cut off"):
        parse_sample(packed[:1024])
    for damaged in (b"\xff" + packed[1:], packed[:124] + b"99999999999" + packed[135:], packed[:500]):
        with pytest.raises(FractalError, match="damaged tar header"):
            parse_sample(damaged)
    with pytest.raises(FractalError, match="one sample"):
        parse_sample(packed + pack_sample(Sample("000000002", {"png": b""})))
    with pytest.raises(FractalError, match="twice"):
        parse_sample(packed + packed)
    link = tarfile.TarInfo("000000001.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(FractalError, match="not a regular file"):
        parse_sample(link.tobuf(tarfile.USTAR_FORMAT))
