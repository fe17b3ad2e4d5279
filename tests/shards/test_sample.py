"""Samples, their labels and digests, and the shards that hold them, as shards/README.md specifies."""

import json
import tarfile

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from damages import edit
from fractalshards import open_dataset
from fractalshards.digest import mapping_digest, systems_digest
from fractalshards.errors import FractalError
from fractalshards.manifest import DatasetInfo, load_manifest
from fractalshards.png import decode_image
from fractalshards.reader import index_split, iterate_shard
from fractalshards.sample import (
    MultiLabel,
    Object,
    Sample,
    _pack_header,
    _parse_header,
    classes_of,
    decode_label,
    encode_label,
    parse_sample,
)
from fractalshards.systems import read_systems
from fractalshards.writer import ShardTask, finished_shards, publish
from packing import is_sound, run, write_tar

pytestmark = pytest.mark.usefixtures("threads")
BOX = b'"bbox":[0,0,1,1]'


def test_publish_refuses_vanished_shards(tmp_path):
    task = ShardTask("train", "train-000000.tar", 0, 2)
    with pytest.raises(FractalError, match="train-000000"):
        publish(tmp_path, (task,), (task,), DatasetInfo({}, "single", 1))


NAMES, SIZES = st.text("0123456789.abc", min_size=1, max_size=100), st.integers(0, 8**11 - 1)


@given(NAMES, SIZES, st.integers(0, 511), st.integers(0, 255), st.booleans())
def test_headers_are_those_of_tarfile(name, size, place, byte, mended):
    header = tarfile.TarInfo(name)
    header.size = size
    block = bytearray(_pack_header(name.encode(), size))
    assert block == header.tobuf(tarfile.USTAR_FORMAT)
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


def test_parse_sample_with_gnu_headers(tmp_path):
    files = {"000000001.png": b"x" * 700, "000000001.cls": b"3"}
    path = write_tar(tmp_path / "a.tar", files, tarfile.GNU_FORMAT, mtime=1_700_000_000, uname="somebody")
    assert parse_sample(path.read_bytes()[:2560]) == Sample("000000001", {"png": b"x" * 700, "cls": b"3"})


def hashed(sample: Sample) -> bytes:
    png, jpg = (sample.files.get(extension, b"") for extension in ("png", "jpg"))
    image = b"16x16\0" + decode_image(png).tobytes() if png else b"file %d\0%b" % (len(jpg), jpg)
    return b"%b\0%b\0%b\0" % (sample.key.encode(), image, sample.files["cls"])


def test_digests_are_as_specified(dataset, packed):
    for folder in (dataset, packed):
        manifest, digests = load_manifest(folder), {}
        for split, shards in manifest.splits.items():
            contents = [b"".join(map(hashed, iterate_shard(shard))) for shard in index_split(manifest, split)]
            digests[split] = [*map(xxhash.xxh3_128_hexdigest, contents)]
            assert digests[split] == [shard.content_digest for shard in shards]
        text = json.dumps(digests, separators=(",", ":"))
        assert manifest.content_digest() == xxhash.xxh3_128_hexdigest(text.encode())
    systems = read_systems(dataset / "systems.npz")
    shapes_and_values = b"".join(b"2x2x3\0" + np.asarray(system, "<f8").tobytes() for system in systems)
    assert systems_digest(systems) == xxhash.xxh3_128_hexdigest(shapes_and_values)
    recipe = {"size": 224, "kind": "single", "jitter": [0.8, 1e-05], "name": "é"}
    canonical = b'{"jitter":[0.8,1e-05],"kind":"single","name":"\\u00e9","size":224}'
    assert mapping_digest(recipe) == xxhash.xxh3_128_hexdigest(canonical)


COORDINATES, SIDES = st.integers(0, 999), st.integers(1, 999)
OBJECTS = st.builds(Object, st.integers(0, 99_999), st.tuples(COORDINATES, COORDINATES, SIDES, SIDES))
MULTI_LABELS = st.lists(OBJECTS, min_size=1, max_size=9).map(lambda drawn: MultiLabel.of(tuple(drawn)))


@given(st.integers(0, 10**9 - 1) | MULTI_LABELS)
def test_label_round_trip(label):
    extension, text = encode_label(label)
    assert decode_label({"png": b"", extension: text}) == label
    assert extension == ("cls" if isinstance(label, int) else "json")


def test_multi_label_json():
    label = MultiLabel.of((Object(7, (1, 2, 3, 4)), Object(2, (0, 0, 5, 5)), Object(7, (9, 9, 1, 1))))
    _, text = encode_label(label)
    assert text == (
        b'{"labels":[2,7],"objects":[{"class":7,"bbox":[1,2,3,4]},{"class":2,"bbox":[0,0,5,5]},'
        b'{"class":7,"bbox":[9,9,1,1]}]}'
    )
    assert classes_of(label) == (2, 7)
    assert classes_of(3) == (3,)


@pytest.mark.parametrize(
    "files",
    [
        {"json": b"{"},
        {"json": b'{"labels":[],"objects":[]}'},
        {"json": b'{"labels":[1,2],"objects":[{"class":1,%s}]}' % BOX},
        {"json": b'{"labels":[2,1],"objects":[{"class":1,%s},{"class":2,%s}]}' % (BOX, BOX)},
        {"json": b'{"labels":[-1],"objects":[{"class":-1,%s}]}' % BOX},
        {"json": b'{"labels":[1],"objects":[{"class":1,"bbox":[0,0,0,1]}]}'},
        {"json": b" " * ((1 << 20) + 1)},
        {"png": b""},
        {"cls": b"1", "json": b"{}"},
    ],
    ids=lambda files: str(files)[:60],
)
def test_decode_label_rejects(files):
    with pytest.raises(FractalError):
        decode_label(files)


def test_multi_label_dataset_has_boxes_inside_of_its_images(multi):
    stored, path = open_dataset(multi), multi / "train-000000.tar"
    assert stored.label_counts.tolist() == [4, 4, 4]
    with pytest.raises(FractalError, match="several"):
        _ = stored.labels
    assert is_sound(multi)
    for old, new, problem in (
        (b'"bbox":[3,0,3,4]', b'"bbox":[3,0,3,9]', "content digest"),
        (b'"bbox":[3,0,3,9]', b'"bbox":[9,0,9,9]', "000000003: bbox [9, 0, 9, 9]"),
    ):
        data = path.read_bytes()
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, new))
        assert problem in run("verify", multi, "--workers", 1).output


def test_finished_shards_have_valid_sidecars_and_sizes(dataset):
    def is_finished(samples: int = 5, classes: int = 3) -> bool:
        task = ShardTask("train", "train-000000.tar", 0, samples)
        return bool(finished_shards(dataset, [task], DatasetInfo({}, "single", classes)))

    assert (is_finished(), is_finished(samples=4), is_finished(classes=4)) == (True, False, False)
    sidecar = dataset / "train-000000.json"
    before = sidecar.read_text()
    for changes in ({"label_counts": [7, 4, 4]}, {"label_counts": [1, 2, 1]}, {"samples": 4}, {"bytes": 1 << 20}):
        edit(sidecar, **changes)
        assert not is_finished()
        sidecar.write_text(before)
    assert is_finished()
