"""``push`` and ``pull``: the target receives the whole, checked dataset, or nothing that looks like one."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import Mock

import fsspec
import huggingface_hub
import pytest
import s3fs
from botocore.exceptions import NoCredentialsError
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

import packing
from building import files as contents
from damages import HOSTILE, MARK, SHARD, SIDECAR, edit, edit_split, overwrite, train_split
from fractalshards.errors import FractalError, UsageError
from fractalshards.manifest import INFO, RECIPE, SYSTEMS, load_manifest
from fractalshards.recipe_file import read_portable
from fractalshards.remote import transfer
from fractalshards.remote.card import PORTABLE, PREVIEW, README
from fractalshards.remote.stores import (
    FileInfo,
    HubStore,
    S3Store,
    Store,
    Upload,
    WebStore,
    open_store,
    parse_location,
    redact,
)
from fractalshards.storage import write_json
from packing import assert_refused, run, write_small

pytestmark = pytest.mark.usefixtures("impatient")
FIRST, SECOND = "train-000000.tar", "train-000001.tar"
COMMAND = [sys.executable, "-c", "from fractalshards.cli import main; main()"]
DATA = bytes(range(256)) * 20_000
WHOLE = FileInfo(len(DATA), hashlib.sha256(DATA).hexdigest())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "out"


@pytest.fixture
def with_val(tmp_path: Path) -> Path:
    """Two shards of five samples, and one of two in the split ``val``."""
    return write_small(tmp_path / "with_val", [0, 1, 2, 0, 1] * 2 + [1, 2], 5, val=2)


def good(*arguments: object) -> str:
    return packing.good(*arguments).stdout


def bad(*arguments: object, code: int = 1) -> str:
    result = run(*arguments)
    assert_refused(result, code, "error: ")
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "scheme", "file"),
    [
        ("./odd:name", "file", "odd:name/f"),
        ("~/x", "file", "/home/me/x/f"),
        ("file:///data/a%20set/50%25/%E2%82%AC/", "file", "/data/a set/50%/€/f"),
        ("s3://bucket/a set/x//", "s3", "bucket/a set/x/f"),
        ("gcs://bucket/x", "gs", "bucket/x/f"),
        ("hf://datasets/user/name@v1/a", "hf", "datasets/user/name@v1/a/f"),
        ("HTTP://[::1]:8000/x", "http", "HTTP://[::1]:8000/x/f"),
        ("https://me:pass@host/a set/?sig=a%2Fb&x=1", "http", "https://me:pass@host/a set/f?sig=a%2Fb&x=1"),
    ],
)
def test_urls_of_folders(text, scheme, file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    location = parse_location(text)
    assert (location.scheme, location.file("f")) == (scheme, file)
    assert not any(secret in location.shown for secret in ("pass", "sig"))


@pytest.mark.parametrize(
    "text",
    [
        "", "pipe:cat /etc/passwd", "simplecache::s3://bucket/x", "zip://*.tar::https://host/x.zip", "reference://x",
        "ftp://host/x", "s3:bucket", "s3:///x", "s3://key:secret@bucket/x", "hf://user/model", "https:///x",
        "https://host/x#part", "file://host/x", "file:///x%00y",
    ],
)  # fmt: skip
def test_other_urls_are_refused(text):
    with pytest.raises(UsageError) as error:
        parse_location(text)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("faults", "requests", "info", "message"),
    [
        (["503", "cut", "429", "flip"], 5, WHOLE, None),
        ([], 1, FileInfo(1000, hashlib.sha256(DATA[:1000]).hexdigest()), None),  # no more is read than promised
        (["flip", "forever"], 7, WHOLE, "sha256"),
        (["endless", "forever"], 7, WHOLE, "sha256"),
        (["503", "forever"], 7, WHOLE, "503"),
        ([], 7, FileInfo(len(DATA) + 1, WHOLE.sha256), "ends after"),
        (["403"], 1, WHOLE, "access denied"),
        (["410"], 1, WHOLE, "410"),
        (["404"], 1, WHOLE, "does not exist"),
    ],
)
def test_fetch_gets_the_whole_file_or_nothing(tmp_path, out, web, faults, requests, info, message):
    (tmp_path / "a source").mkdir()
    (tmp_path / "a source" / "f.tar").write_bytes(DATA)
    server = web(tmp_path)
    server.faults["f.tar"] = faults
    refusal = pytest.raises((FractalError, OSError), match=message) if message else nullcontext()
    with (tmp_path / "copy").open("w+b") as file, refusal:
        open_store(f"{server.url}/a source/?token=abc").fetch("f.tar", file, info)
        file.seek(0)
        assert file.read() == DATA[: info.size]
    assert server.count("f.tar") == requests
    assert server.queries == {"token=abc"}


def test_small_files_are_bounded(tmp_path, web):
    (tmp_path / "f").write_bytes(DATA)
    server = web(tmp_path)
    for store in (open_store(str(tmp_path)), open_store(server.url)):
        assert store.read("f", len(DATA)) == DATA
        with pytest.raises(FractalError, match="larger"):
            store.read("f", len(DATA) - 1)
    server.faults["f"] = ["endless"]
    with pytest.raises(FractalError, match="larger"):
        store.read("f", 1 << 20)


@pytest.mark.parametrize("damage", [b"", DATA[:-1] + b"x"])
def test_stores_without_checksums_are_read_back(monkeypatch, damage):
    files, attempts = MemoryFileSystem(), []
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme, **options: files)
    store, upload = open_store("gs://bucket/read-back"), Upload.of_bytes("f", DATA)
    assert type(store) is Store
    store.put([upload])
    assert store.holds(upload.name, upload.info)
    pipe_file = files.pipe_file
    monkeypatch.setattr(files, "pipe_file", lambda path, data: attempts.append(pipe_file(path, damage)))
    with pytest.raises(FractalError, match="damaged"):
        store.put([upload])
    assert len(attempts) == store.attempts


def test_push_sends_nothing_to_a_store_that_may_not_be_read(dataset, monkeypatch):
    files, sent = MemoryFileSystem(), []
    monkeypatch.setattr(fsspec, "filesystem", lambda scheme, **options: files)
    good("push", dataset, "gs://bucket/denied")
    allowed = files.open

    def refuse(path: str, *arguments: object, **options: object) -> object:
        if path.endswith(SIDECAR):
            raise PermissionError
        return allowed(path, *arguments, **options)

    monkeypatch.setattr(files, "open", refuse)
    monkeypatch.setattr(files, "put_file", lambda *paths: sent.append(paths))
    assert SIDECAR in bad("push", dataset, "gs://bucket/denied")
    assert sent == []


def test_pull_moves_only_what_is_missing_or_damaged(dataset, out, web):
    server = web(dataset)
    server.faults = {INFO: ["503"], FIRST: ["cut", "503"], SECOND: ["flip"], "train-000000.json": ["cut"]}
    assert "2 shards copied (27.6 kB); " in good("pull", server.url, out, "--jobs", 2)
    assert contents(out) == contents(dataset)
    server.requests.clear()
    assert "0 shards copied (0 B), 2 shards already there" in good("pull", server.url, out)
    assert {*server.requests} == {INFO, RECIPE, SYSTEMS}
    overwrite(out / FIRST, 700, b"x")
    assert "1 shard copied (13.8 kB), 1 shard already there" in good("pull", server.url, out)
    assert (server.count(FIRST), server.count(SECOND)) == (1, 0)
    os.truncate(out / SECOND, 100)
    (out / "train-000000.json").unlink()
    assert "2 shards copied" in good("pull", server.url, out)
    assert contents(out) == contents(dataset)


def test_push_to_s3_moves_only_what_is_missing_or_damaged(dataset, out, bucket):
    before, url, files = contents(dataset), f"{bucket}/a/set", s3fs.S3FileSystem()
    good("push", dataset, f"{url}/")
    assert {path.rpartition("/")[2] for path in files.find(url)} == before.keys()
    written = files.info(f"{url}/{FIRST}")["LastModified"]
    assert "0 shards copied (0 B), 2 shards already there" in good("push", dataset, url)
    files.pipe(f"{url}/{SECOND}", before[SECOND][:-1] + b"x")
    assert "1 shard copied (13.8 kB), 1 shard already there" in good("push", dataset, url)
    good("pull", url, out)
    assert contents(out) == contents(dataset) == before
    files.invalidate_cache()
    assert files.info(f"{url}/{FIRST}")["LastModified"] == written
    files.rm(f"{url}/train-000000.json")
    assert "1 shard copied" in good("push", dataset, url)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_pull_that_hangs_ends_at_once_and_continues(dataset, out, web, number):
    server = web(dataset)
    server.faults[SECOND] = ["hang"]
    command = [*COMMAND, "pull", server.url, str(out), "--jobs", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.hanging.wait(60)
    process.send_signal(number)
    errors = process.communicate(timeout=15)[1].splitlines()
    if number == signal.SIGINT:
        assert (process.returncode, len(errors)) == (130, 1)
        assert errors[0].startswith(f"error: {out}: stopped")
    assert INFO in bad("info", out)
    assert list(out.glob(".tmp~*"))
    assert "1 shard copied (13.8 kB), 1 shard already there" in good("pull", server.url, out)
    assert contents(out) == contents(dataset)


def test_pull_of_some_shards_and_then_of_more(with_val, out, web):
    server = web(with_val)
    for text in ("0-2", "x", "1-0", "1,,2"):
        assert "shard" in bad("pull", server.url, out, f"--shards={text}", code=2)
    assert not out.exists()
    assert "1 shard copied" in good("pull", server.url, out, "--shards", "1")
    assert load_manifest(out).first_samples == {"train": (5,)}
    assert "sound" in good("verify", out, "--workers", 1)
    assert "2 shards copied" in good("pull", server.url, out, "--shards", "0-0")
    assert contents(out) == contents(with_val)
    before = contents(out)
    good("push", out, with_val, "--shards", "0")
    good("pull", with_val, out, "--shards", "1")
    assert contents(out) == contents(with_val) == before


def test_push_of_other_shards_is_refused(with_val, bucket, out):
    good("push", with_val, bucket, "--shards", "0")
    assert "--shards" in bad("push", with_val, bucket, "--shards", "1")
    good("pull", bucket, out)
    assert load_manifest(out).first_samples == {"train": (0,), "val": (10,)}
    good("push", with_val, bucket)
    assert "0 shards copied" in good("push", out, bucket)  # a part of it takes nothing away
    assert "1 shard copied" in good("pull", bucket, out)
    assert contents(out) == contents(with_val)


def test_push_keeps_a_manifest_that_appears(dataset, out, monkeypatch):
    monkeypatch.setattr(transfer, "_copy_shards", lambda *arguments: (out / INFO).write_text("{}") and [])
    assert INFO in bad("push", dataset, out)
    assert (out / INFO).read_text() == "{}"


def test_another_copy_is_not_overwritten(dataset, tmp_path, bucket):
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    edit_split(other, sha256=["0" * 64, *train_split(other)["sha256"][1:]])
    good("push", dataset, bucket)
    assert f"{bucket}: holds another" in bad("push", other, bucket)
    assert f"{other}: holds another" in bad("pull", bucket, other)


def test_recipe_claims_the_folder(dataset, out):
    out.mkdir(parents=True)
    write_json(out / RECIPE, {"recipe": {}, "recipe_digest": "0" * 32})
    for command in ("push", "pull"):
        assert RECIPE in bad(command, dataset, out)
    assert [path.name for path in out.iterdir()] == [RECIPE]


def test_push_refuses_damaged_datasets(dataset, out, bucket):
    overwrite(dataset / SECOND, 700, b"x")
    for url in (bucket, str(out)):
        assert SECOND in bad("push", dataset, url)
        assert INFO in bad("pull", url, out.with_name("back"))


def test_hostile_sizes_are_refused(dataset, out, web):
    def claim(size: int) -> None:
        edit_split(dataset, bytes=[size, *train_split(dataset)["bytes"][1:]])
        edit(dataset / "train-000000.json", bytes=size)

    server, size = web(dataset), (dataset / FIRST).stat().st_size
    claim(10**18)
    assert "disk" in bad("pull", server.url, out)
    for lie in (size + 512, size - 1):
        claim(lie)
        assert FIRST in bad("pull", server.url, out)
    claim(size)
    server.faults = {"train-000000.json": ["endless", "forever"]}
    assert "train-000000.json" in bad("pull", server.url, out)
    assert not (out / INFO).exists()
    assert sum(path.stat().st_size for path in out.iterdir()) < 100_000


PULLED = [(noun, name) for noun in (INFO, SIDECAR, SYSTEMS, RECIPE) for name in HOSTILE[noun]]


@pytest.mark.parametrize(("noun", "name"), [*PULLED, (SHARD, "other content"), (SHARD, "pipe for a shard")])
def test_hostile_datasets_are_refused(dataset, out, noun, name):
    HOSTILE[noun][name](dataset)
    assert noun.removesuffix("tar") in bad("pull", dataset, out)
    assert not (out / INFO).exists()
    assert not MARK.exists()


def test_folders_that_cannot_be_written_are_refused(dataset, out, read_only_disk):
    out.parent.mkdir()
    out.write_text("a file")
    for folder in (read_only_disk / "x", out):
        for command in ("pull", "push"):
            assert str(folder) in bad(command, dataset, folder)


def test_pull_onto_a_full_disk(dataset, small_disk, monkeypatch):
    (small_disk / "filler").write_bytes(bytes(590_000))
    assert "needs 27.6 kB, the disk has" in bad("pull", dataset, small_disk)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: (10**9, 0, 10**9))
    assert "No space left on device" in bad("pull", dataset, small_disk)
    assert not (small_disk / INFO).exists()
    assert not list(small_disk.glob(".tmp~*"))
    (small_disk / "filler").unlink()
    good("pull", dataset, small_disk)
    assert "sound" in good("verify", small_disk, "--workers", 1)


def test_errors_are_one_line_without_secrets(dataset, out, web, tmp_path, monkeypatch):
    server = web(dataset)
    assert f"{server.url}/none: no {INFO}" in bad("pull", f"{server.url}/none", out)
    assert f"{tmp_path}/none: no {INFO}" in bad("pull", tmp_path / "none", out)
    assert "read only" in bad("push", dataset, server.url, code=2)
    assert f"{tmp_path}/none: no {INFO}" in bad("push", tmp_path / "none", out)
    server.faults[INFO] = ["403"]
    for _ in range(2):
        message = bad("pull", f"http://me:hidden@{server.url[7:]}/?token=abc", out)
        assert not any(word in message for word in ("hidden", "abc", "ssl"))
        server.close()  # and once more, without a server
    untrusted = OSError("CERTIFICATE_VERIFY_FAILED by https://me:pass@host/f?token=abc, url='https://host/f?sig=x'")
    monkeypatch.setattr(WebStore, "_open", Mock(side_effect=untrusted))
    assert "SSL_CERT_FILE" in bad("pull", "https://somewhere/set", out)
    monkeypatch.setattr(S3Store, "_open", Mock(side_effect=NoCredentialsError))
    assert "FSSPEC_S3_ANON" in bad("pull", "s3://bucket/set", out)
    assert redact(str(untrusted)).endswith("by https://***@host/f?***, url='https://host/f?***'")
    assert not out.exists()


class HubFiles(MemoryFileSystem):
    """Stand-in for the file system of Hugging Face."""

    protocol = "hf"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    cachable = False


class Hub:
    """Stand-in for the API of Hugging Face; ``faults`` are used up from the front, ``commits`` are names of files."""

    def __init__(self) -> None:
        self.commits: list[list[str]] = []
        self.faults: list[int] = []

    def create_commit(self, repo_id: str, operations: list, *, repo_type: str, revision: str | None, **_: str) -> None:
        assert (repo_id, repo_type) == ("me/set", "dataset")
        if self.faults:
            response = SimpleNamespace(status_code=self.faults.pop(0), headers={}, request=None)
            raise HfHubHTTPError("no", response=response)
        root = f"datasets/{repo_id}" + (f"@{revision}" if revision else "")
        for operation in operations:
            with operation.as_file() as file:
                fsspec.filesystem("hf").pipe_file(f"{root}/{operation.path_in_repo}", file.read())
        self.commits.append([operation.path_in_repo for operation in operations])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub, before = Hub(), fsspec.get_filesystem_class("hf")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(HubFiles, "store", {})
    fsspec.register_implementation("hf", HubFiles, clobber=True)
    yield hub
    fsspec.register_implementation("hf", before, clobber=True)


def test_hub_commits(dataset, out, hub):
    """Few commits, the manifest alone in the last; nothing is written into the source folder."""
    before = contents(dataset)
    hub.faults = [409, 429]
    assert "2 shards copied" in good("push", dataset, "hf://datasets/me/set")
    tars = ["train-000000.tar", "train-000000.json", "train-000001.tar", "train-000001.json"]
    assert hub.commits == [["recipe.json", "systems.npz"], tars, [PREVIEW, PORTABLE, README], [INFO]]
    assert "0 shards copied" in good("push", dataset, "hf://datasets/me/set")
    assert len(hub.commits) == 4
    good("pull", "hf://datasets/me/set", out)
    assert contents(out) == contents(dataset) == before


def test_hub_folder_of_a_revision(dataset, hub, monkeypatch):
    monkeypatch.setattr(HubStore, "batch_size", 1)
    hub.faults = [403]
    assert "access denied" in bad("push", dataset, "hf://datasets/me/set@main/a/folder")
    assert hub.commits == []
    good("push", dataset, "hf://datasets/me/set@main/a/folder")
    shards = [f"a/folder/train-00000{number}" for number in (0, 1)]
    assert sorted(hub.commits[1:-1]) == [[f"{shard}.tar", f"{shard}.json"] for shard in shards]


def test_hub_card_is_how_load_dataset_reads_the_tars(with_val, tmp_path, hub):
    good("push", with_val, "hf://datasets/me/set")
    copy = tmp_path / "copy"
    fsspec.filesystem("hf").get("datasets/me/set/", str(copy), recursive=True)
    card = huggingface_hub.DatasetCard.load(copy / README)
    assert (card.data.license, card.data.size_categories, "random" in card.data.tags) == ("mit", ["n<1K"], True)
    assert load_manifest(with_val).content_digest() in card.text
    assert Image.open(copy / PREVIEW).height > 3 * 16
    assert read_portable(copy / PORTABLE).digest == load_manifest(with_val).content_digest()
    assert "sound" in good("verify", copy)  # of other files than its own, a dataset may have any
    pytest.importorskip("datasets")
    (code,) = re.findall(r"```python\n(from datasets .*?)```", card.text, re.DOTALL)
    names: dict = {}
    exec(code.replace('"me/set"', repr(str(copy))), names)
    labels = {split: [row["cls"] for row in names["dataset"][split]] for split in ("train", "val")}
    assert labels == {"train": [index % 3 for index in (*range(5), *range(5))], "val": [1, 2]}


def test_hub_card_of_a_part_and_of_packed_images_has_no_recipe(dataset, packed, hub):
    good("push", dataset, "hf://datasets/me/set@v1", "--shards", "1")
    assert hub.commits[2] == [PREVIEW, README]
    text = fsspec.filesystem("hf").cat_file("datasets/me/set@v1/README.md").decode()
    assert (PORTABLE in text, "train-{000001..000001}.tar" in text, 'revision="v1"' in text) == (False, True, True)
    good("push", packed, "hf://datasets/me/set")
    card = huggingface_hub.DatasetCard(fsspec.filesystem("hf").cat_file("datasets/me/set/README.md").decode())
    assert (card.data.license, PORTABLE in card.text, "png;jpg;webp" in card.text) == ("unknown", False, True)


@pytest.mark.parametrize("place", ["folder", "repository"])
def test_hub_card_of_others_stays(dataset, hub, place):
    if place == "folder":
        (dataset / README).write_bytes(b"my own")
    else:
        fsspec.filesystem("hf").pipe_file("datasets/me/set/README.md", b"my own")
    good("push", dataset, "hf://datasets/me/set")
    assert fsspec.filesystem("hf").cat_file("datasets/me/set/README.md") == b"my own"
    assert not any(PREVIEW in names for names in hub.commits)
