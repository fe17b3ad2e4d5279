"""Single files to and from elsewhere: whole and right, or not there, whatever the other end does."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fractalshards.errors import FractalError
from fractalshards.remote.stores import Told, Upload
from fractalshards.remote.transfer import open_destination, open_remote

pytestmark = pytest.mark.usefixtures("impatient")
DATA = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "a source"
    folder.mkdir()
    (folder / "f.tar").write_bytes(DATA)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "f.tar"


class Bytes:
    """Adds up what moved."""

    def __init__(self) -> None:
        self.moved = 0

    def __call__(self, count: int) -> None:
        self.moved += count


def upload(source: Path) -> list[Upload]:
    return [Upload("f.tar", source / "f.tar", Told(len(DATA), SHA256))]


def fetch(url: str, out: Path, size: int = len(DATA), sha256: str = SHA256) -> int:
    moved = Bytes()
    open_remote(url).fetch("f.tar", out, size, sha256, moved)
    return moved.moved


def test_a_file_from_a_web_server(source: Path, out: Path, web: Callable) -> None:
    server = web(source.parent)
    assert fetch(f"{server.url}/a source/?token=abc", out) == len(DATA)
    assert out.read_bytes() == DATA
    assert server.queries == {"token=abc"}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on_where_it_broke(source: Path, out: Path, web: Callable, ranges: bool) -> None:
    data = DATA * 20  # several pieces, and more than the connection holds that breaks
    (source / "f.tar").write_bytes(data)
    server = web(source)
    server.ranges = ranges
    server.faults["f.tar"] = ["503", "cut", "cut"]
    assert fetch(server.url, out, len(data), hashlib.sha256(data).hexdigest()) == len(data)
    assert out.read_bytes() == data
    starts = [start for _, start in server.requests]
    assert len(starts) == 4
    if ranges:
        assert starts[:2] == [0, 0]
        assert 0 < starts[2] <= len(data) // 2
        assert starts[2] < starts[3] < len(data)


def test_a_flipped_bit_is_noticed_and_the_file_fetched_again(source: Path, out: Path, web: Callable) -> None:
    server = web(source)
    server.faults["f.tar"] = ["flip", "flip"]
    assert fetch(server.url, out) == len(DATA)
    assert out.read_bytes() == DATA


@pytest.mark.parametrize(
    ("faults", "requests", "message"),
    [
        (["flip", "forever"], 3, "f.tar: damaged, its sha256 is not that in the manifest; it must be pushed again"),
        (["404"], 1, "f.tar: not there; check the URL"),
        (["403"], 1, "f.tar: access denied; check credentials and permissions"),
        (["410"], 1, "f.tar: the server answers 410"),
        (["503", "forever"], 8, "f.tar: the server answers 503 (tried 8 times)"),
        (["endless"], 1, None),
    ],
)
def test_what_cannot_be_had_is_one_error_and_leaves_nothing(
    source: Path, out: Path, web: Callable, faults: list[str], requests: int, message: str | None
) -> None:
    server = web(source)
    server.faults["f.tar"] = faults
    if message is None:  # a server that never stops is cut off, and its zeros are not the file
        server.faults["f.tar"] = ["endless", "forever"]
        message, requests = "damaged", 3
    with pytest.raises(FractalError, match=r"f\.tar") as error:
        fetch(server.url, out)
    assert message in str(error.value)
    assert str(error.value).startswith(server.url)
    assert server.count("f.tar") == requests
    assert list(out.parent.iterdir()) == []


def test_a_file_shorter_than_promised(source: Path, out: Path, web: Callable) -> None:
    with pytest.raises(FractalError, match="ends after 512,000 of 512,001 bytes"):
        fetch(web(source).url, out, len(DATA) + 1)
    with pytest.raises(FractalError, match="ends after 512,000 of 512,001 bytes"):
        fetch(str(source), out, len(DATA) + 1)


def test_bytes_after_those_promised_are_not_read(source: Path, out: Path, web: Callable) -> None:
    assert fetch(web(source).url, out, 1000, hashlib.sha256(DATA[:1000]).hexdigest()) == 1000
    assert out.read_bytes() == DATA[:1000]


def test_nobody_listens(source: Path, out: Path, web: Callable) -> None:
    server = web(source)
    server.close()
    with pytest.raises(FractalError, match=r"f\.tar: .*Connect.*tried 8 times"):
        fetch(server.url, out)


def test_small_files_are_bounded(source: Path, web: Callable) -> None:
    server = web(source)
    for url in (server.url, str(source)):
        remote = open_remote(url)
        assert remote.read("f.tar", len(DATA)) == DATA
        assert remote.read("g.tar", 10) is None
        with pytest.raises(FractalError, match="larger than 0 MiB"):
            remote.read("f.tar", len(DATA) - 1)
    server.faults["f.tar"] = ["endless"]
    with pytest.raises(FractalError, match="larger than 1 MiB"):
        open_remote(server.url).read("f.tar", 1 << 20)


def test_to_and_from_s3(source: Path, out: Path, bucket: str) -> None:
    remote, moved = open_destination(f"{bucket}/a set/"), Bytes()
    assert not remote.holds("f.tar", len(DATA), SHA256)
    remote.send(upload(source), moved)
    assert moved.moved == len(DATA)
    assert remote.store.told("f.tar") == Told(len(DATA), SHA256)
    assert remote.holds("f.tar", len(DATA), SHA256)
    assert not remote.holds("f.tar", len(DATA) + 1, SHA256)
    assert not remote.holds("f.tar", len(DATA), SHA256[::-1])
    assert fetch(f"{bucket}/a set", out) == len(DATA)
    assert out.read_bytes() == DATA
    with pytest.raises(FractalError, match="not there; check the URL"):
        fetch(f"{bucket}/elsewhere", out)
    with pytest.raises(FractalError, match="not there; check the URL"):
        fetch(f"{bucket}-none/x", out)


def test_s3_without_credentials_says_so(bucket: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(FractalError, match="no credentials; set AWS_ACCESS_KEY_ID"):
        fetch(bucket, out)


def test_a_local_file_that_is_not_what_it_should_be_is_not_sent(source: Path, out: Path, bucket: str) -> None:
    (source / "f.tar").write_bytes(DATA[:-1] + b"x")
    for url in (bucket, str(out.parent)):
        with pytest.raises(FractalError, match=r"f\.tar: .*(not what the manifest says|damaged)"):
            open_destination(url).send(upload(source), Bytes())
    assert open_destination(bucket).store.told("f.tar") is None
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "module", "advice"),
    [
        ("s3://b/x", "s3fs", r"s3:// needs s3fs, which is not installed; run pip install '\.\[s3\]'"),
        ("gs://b/x", "gcsfs", "gs:// needs gcsfs, which is not installed; run pip install gcsfs"),
        ("hf://datasets/a/b", "huggingface_hub", r"hf:// needs huggingface_hub, .* run pip install '\.\[hub\]'"),
    ],
)
def test_missing_packages_are_named(url: str, module: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, url.partition(":")[0], raising=False)
    with pytest.raises(FractalError, match=advice):
        open_remote(url)
