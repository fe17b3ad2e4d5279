"""``fractalshards push`` and ``pull``: what arrives is the dataset, whole and checked, or nothing looks like it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import s3fs
from click.testing import CliRunner, Result

from fractalshards.cli import main
from fractalshards.manifest import INFO, RECIPE, SYSTEMS, load_manifest, sample_key, write_manifest
from fractalshards.remote import transfer as pull_module
from fractalshards.storage import write_json
from fractalshards.writer import write_shard

pytestmark = pytest.mark.usefixtures("impatient")
FIRST, SECOND = "train-000000.tar", "train-000001.tar"
COMMAND = "import sys; from fractalshards.cli import main; main(sys.argv[1:])"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "new" / "out"


@pytest.fixture
def with_val(dataset: Path) -> Path:
    """The dataset with a ``val`` split of one shard."""
    manifest = load_manifest(dataset)
    samples = [(sample_key(index), (np.full((16, 16, 3), index, np.uint8), index % 3)) for index in (10, 11)]
    val = write_shard(dataset, "val-000000.tar", 3, samples).shard()
    traits = {name: getattr(manifest, name) for name in ("recipe", "recipe_digest", "label_type", "classes")}
    write_manifest(dataset, {**manifest.splits, "val": [val]}, image_size=16, **traits)
    return dataset


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def good(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def bad(*arguments: object, code: int = 1) -> str:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    return lines[0]


def same(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


def change_info(folder: Path, change: Callable[[dict], None]) -> None:
    info = json.loads((folder / INFO).read_text())
    change(info)
    (folder / INFO).write_text(json.dumps(info))


def test_pull_from_a_web_server(dataset: Path, out: Path, web: Callable) -> None:
    server = web(dataset)
    assert "2 shards moved (27.6 kB); " in good("pull", server.url, out)
    assert same(dataset, out)
    assert server.requests[-1][0] != INFO
    server.requests.clear()
    assert "0 shards moved (0 B), 2 shards there already" in good("pull", server.url, out)
    assert not [name for name, _ in server.requests if name.endswith(".tar")]


def test_push_to_a_folder_and_on_to_another(dataset: Path, out: Path, tmp_path: Path) -> None:
    good("push", dataset, out)
    assert same(dataset, out)
    good("push", f"{out}/", f"file://{tmp_path}/a copy/")
    assert same(dataset, tmp_path / "a copy")


def test_push_to_s3_and_pull_from_it(dataset: Path, out: Path, bucket: str) -> None:
    good("push", dataset, f"{bucket}/a/set/")
    files = s3fs.S3FileSystem()
    assert {path.rpartition("/")[2] for path in files.find(f"{bucket}/a/set")} == {p.name for p in dataset.iterdir()}
    good("pull", f"{bucket}/a/set", out)
    assert same(dataset, out)


def test_only_what_is_missing_or_damaged_is_pushed(dataset: Path, bucket: str) -> None:
    good("push", dataset, bucket)
    files = s3fs.S3FileSystem()
    written = files.info(f"{bucket}/{FIRST}")["LastModified"]
    assert "0 shards moved (0 B), 2 shards there already" in good("push", dataset, bucket)
    files.pipe(f"{bucket}/{SECOND}", (dataset / SECOND).read_bytes()[:-1] + b"x")
    assert "1 shard moved (13.8 kB), 1 shard there already" in good("push", dataset, bucket)
    files.invalidate_cache()
    assert files.cat(f"{bucket}/{SECOND}") == (dataset / SECOND).read_bytes()
    assert files.info(f"{bucket}/{FIRST}")["LastModified"] == written
    files.rm(f"{bucket}/train-000000.json")
    assert "1 shard moved" in good("push", dataset, bucket)


def test_only_what_is_missing_or_damaged_is_pulled(dataset: Path, out: Path, web: Callable) -> None:
    server = web(dataset)
    good("pull", server.url, out)
    with (out / FIRST).open("r+b") as file:
        os.pwrite(file.fileno(), b"x", 700)
    server.requests.clear()
    assert "1 shard moved (13.8 kB), 1 shard there already" in good("pull", server.url, out)
    assert server.count(FIRST) == 1
    assert server.count(SECOND) == 0
    os.truncate(out / SECOND, 100)
    (out / "train-000000.json").unlink()
    assert "2 shards moved" in good("pull", server.url, out)
    assert same(dataset, out)


def test_broken_connections_and_flipped_bits_on_the_way(dataset: Path, out: Path, web: Callable) -> None:
    server = web(dataset)
    server.faults = {INFO: ["503"], FIRST: ["cut", "cut", "503"], SECOND: ["flip"], "train-000000.json": ["cut"]}
    good("pull", server.url, out, "--jobs", 2)
    assert same(dataset, out)


def test_a_copy_that_stays_damaged_is_named(dataset: Path, out: Path, web: Callable) -> None:
    server = web(dataset)
    server.faults[SECOND] = ["flip", "forever"]
    assert f"{server.url}/{SECOND}: damaged" in bad("pull", server.url, out)
    assert not (out / INFO).exists()
    assert not (out / SECOND).exists()
    server.faults.clear()
    good("pull", server.url, out)
    assert same(dataset, out)


def test_killed_in_the_middle_and_run_again(dataset: Path, out: Path, web: Callable) -> None:
    server = web(dataset)
    server.faults[SECOND] = ["hang"]
    process = subprocess.Popen([sys.executable, "-c", COMMAND, "pull", server.url, str(out), "--jobs", "1"])
    assert server.hanging.wait(60)
    process.kill()
    process.wait()
    assert not (out / INFO).exists()
    assert bad("info", out).startswith(f"error: {out}: no {INFO}, so not a finished dataset")
    assert list(out.glob(".tmp~*"))
    assert "1 shard moved (13.8 kB), 1 shard there already" in good("pull", server.url, out)
    assert same(dataset, out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_in_a_connection_that_hangs(
    dataset: Path, out: Path, web: Callable, number: signal.Signals, code: int
) -> None:
    server = web(dataset)
    server.faults[FIRST] = ["hang"]
    words = [sys.executable, "-c", COMMAND, "pull", server.url, str(out)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert server.hanging.wait(60)
    process.send_signal(number)
    _, err = process.communicate(timeout=15)
    assert process.returncode == code
    assert err == f"error: {out}: stopped; what was moved is kept, run the same command again to go on\n"
    assert not (out / INFO).exists()


def test_parts(with_val: Path, out: Path, bucket: str) -> None:
    good("push", with_val, bucket)
    assert "1 shard moved" in good("pull", bucket, out, "--shards", "1")
    assert json.loads((out / INFO).read_text())["splits"].keys() == {"train"}
    assert load_manifest(out).first_samples == {"train": (5,)}
    assert "sound" in good("verify", out, "--workers", 1)
    assert "5 images in 1 shard" in good("info", out)
    assert "2 shards moved" in good("pull", bucket, out, "--shards", "0")
    assert same(with_val, out)


def test_a_part_of_every_split_and_then_the_rest(with_val: Path, out: Path, web: Callable) -> None:
    server = web(with_val)
    assert "2 shards moved" in good("pull", server.url, out, "--shards", "0")
    assert {split: len(shards) for split, shards in load_manifest(out).splits.items()} == {"train": 1, "val": 1}
    assert load_manifest(out).first_samples == {"train": (0,), "val": (10,)}
    assert "sound" in good("verify", out, "--workers", 1)
    assert "1 shard moved (13.8 kB), 2 shards there already" in good("pull", server.url, out)
    assert same(with_val, out)


def test_parts_are_pushed_and_add_up(with_val: Path, out: Path, tmp_path: Path) -> None:
    good("push", with_val, out, "--shards", "1")
    assert "sound" in good("verify", out, "--workers", 1)
    part = tmp_path / "part"
    good("pull", with_val, part, "--shards", "0-0")
    good("push", part, out)
    assert same(with_val, out)


def test_a_part_elsewhere_takes_nothing_from_the_whole_here(with_val: Path, tmp_path: Path) -> None:
    part, before = tmp_path / "part", (with_val / INFO).read_bytes()
    good("pull", with_val, part, "--shards", "0")
    good("pull", part, with_val)
    good("push", part, with_val)
    assert (with_val / INFO).read_bytes() == before


def test_shards_that_are_not_there(dataset: Path, out: Path) -> None:
    assert "has no shard 2; its numbers are 0-1" in bad("pull", dataset, out, "--shards", "0-2", code=2)
    for text in ("x", "1-0", "", "1,,2", "-1"):
        bad("pull", dataset, out, f"--shards={text}", code=2)
    assert not out.exists()


def test_another_dataset_is_not_overwritten(dataset: Path, tmp_path: Path, bucket: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    samples = [(sample_key(index), (np.zeros((16, 16, 3), np.uint8), index % 3)) for index in range(5)]
    record = write_shard(other, FIRST, 3, samples)

    def relist(info: dict) -> None:
        split = info["splits"]["train"]
        split["bytes"][0], split["sha256"][0] = record.bytes, record.sha256
        split["content_digests"][0] = record.content_digest

    change_info(other, relist)
    good("push", dataset, bucket)
    assert f"holds another dataset ({FIRST} has other content)" in bad("push", other, bucket)
    assert f"{other}: holds another dataset" in bad("pull", bucket, other)
    for folder in (other, dataset):
        change_info(folder, lambda info: info.update(recipe_digest="f" * 32))
    assert "recipe and manifest disagree" in bad("push", other, bucket)
    (other / INFO).unlink()
    recipe = json.loads((other / RECIPE).read_text())
    (other / RECIPE).write_text(json.dumps(recipe | {"recipe_digest": "f" * 32}))
    assert f"{other}: holds another dataset (recipe.json differs)" in bad("pull", bucket, other)


def test_another_copy_of_the_same_content_stays(dataset: Path, tmp_path: Path) -> None:
    """Its tar has other bytes, as on a machine with another deflate library."""
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    change_info(other, lambda info: info["splits"]["train"]["sha256"].__setitem__(0, "0" * 64))
    sidecar = json.loads((other / "train-000000.json").read_text())
    (other / "train-000000.json").write_text(json.dumps(sidecar | {"sha256": "0" * 64}))
    before = (dataset / FIRST).stat().st_mtime_ns
    assert "0 shards moved" in good("pull", other, dataset)
    assert (dataset / FIRST).stat().st_mtime_ns == before
    assert "sound" in good("verify", dataset, "--workers", 1)


def test_a_damaged_local_dataset_is_not_pushed(dataset: Path, out: Path, bucket: str) -> None:
    with (dataset / SECOND).open("r+b") as file:
        os.pwrite(file.fileno(), b"x", 700)
    for url in (bucket, str(out)):
        assert SECOND in bad("push", dataset, url)
        assert f"no {INFO}" in bad("pull", url, out.with_name("back"))
    (dataset / INFO).unlink()
    assert "not a finished dataset" in bad("push", dataset, out)


@pytest.mark.parametrize(
    "name", ["../evil.tar", "/tmp/evil.tar", "pipe:ls.tar", "recipe.tar", "train-000000.json", ".tmp~x.tar", "a.tar"]
)
def test_hostile_names_write_nothing(dataset: Path, out: Path, web: Callable, name: str) -> None:
    change_info(dataset, lambda info: info["splits"]["train"]["filenames"].__setitem__(0, name))
    assert "do not use this dataset" in bad("pull", web(dataset).url, out)
    assert not out.exists()


def test_lies_about_sizes(dataset: Path, out: Path, web: Callable) -> None:
    def claim(size: int) -> None:
        change_info(dataset, lambda info: info["splits"]["train"]["bytes"].__setitem__(0, size))

    server = web(dataset)
    true_size = (dataset / FIRST).stat().st_size
    claim(10**18)
    assert "needs 1e+06 TB, the disk has" in bad("pull", server.url, out)
    claim(true_size + 512)
    assert "ends after 13,824 of 14,336 bytes" in bad("pull", server.url, out)
    claim(true_size - 512)
    assert "damaged" in bad("pull", server.url, out)
    server.faults[FIRST] = ["endless", "forever"]
    claim(true_size)
    assert "damaged" in bad("pull", server.url, out)
    server.faults = {"train-000000.json": ["endless", "forever"]}
    assert "train-000000.json: larger than 16 MiB" in bad("pull", server.url, out)
    assert not (out / INFO).exists()
    assert sum(path.stat().st_size for path in out.iterdir()) < 100_000


def test_sidecar_recipe_and_systems_must_fit(dataset: Path, out: Path, web: Callable) -> None:
    server = web(dataset)
    sidecar = dataset / "train-000001.json"
    text = sidecar.read_text()
    sidecar.write_text(text.replace('"samples": 5', '"samples": 6'))
    assert "train-000001.json: the offsets do not fit 6 samples" in bad("pull", server.url, out)
    sidecar.write_text(json.dumps(json.loads(text) | {"content_digest": "0" * 32}))
    assert "manifest and sidecar disagree" in bad("pull", server.url, out)
    sidecar.write_text(text)
    shutil.rmtree(out)
    systems = (dataset / SYSTEMS).read_bytes()
    (dataset / SYSTEMS).write_bytes(b"no zip")
    assert f"{SYSTEMS}: damaged" in bad("pull", server.url, out)
    (dataset / SYSTEMS).unlink()
    assert f"no {SYSTEMS} there" in bad("pull", server.url, out)
    (dataset / SYSTEMS).write_bytes(systems)
    recipe = (dataset / RECIPE).read_text()
    (dataset / RECIPE).write_text(recipe.replace('"n": 10', '"n": 11'))
    assert "recipe and manifest disagree" in bad("pull", server.url, out.with_name("again"))
    assert not (out / INFO).exists()


def test_a_destination_that_cannot_be_written(dataset: Path, out: Path, read_only_disk: Path) -> None:
    assert "Read-only file system; choose a folder you may write" in bad("pull", dataset, read_only_disk)
    assert "Read-only file system; choose a folder you may write" in bad("push", dataset, read_only_disk / "x")
    out.parent.mkdir()
    out.write_text("a file")
    assert "choose a path that is not a file" in bad("pull", dataset, out)


def test_a_full_disk(dataset: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (small_disk / "filler").write_bytes(bytes(585_000))
    assert f"{small_disk}: needs 27.6 kB, the disk has" in bad("pull", dataset, small_disk)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(pull_module.shutil, "disk_usage", lambda folder: usage(10**9, 0, 10**9))
    assert "No space left on device; free some space or choose another folder" in bad("pull", dataset, small_disk)
    assert not (small_disk / INFO).exists()
    assert not list(small_disk.glob(".tmp~*"))
    (small_disk / "filler").unlink()
    good("pull", dataset, small_disk)
    assert "sound" in good("verify", small_disk, "--workers", 1)


def test_errors_are_one_line(dataset: Path, out: Path, web: Callable, tmp_path: Path) -> None:
    server = web(dataset)
    assert f"{server.url}/none: no {INFO} there" in bad("pull", f"{server.url}/none", out)
    assert f"{tmp_path}/none: no {INFO} there" in bad("pull", tmp_path / "none", out)
    assert "web servers are read only" in bad("push", dataset, server.url, code=2)
    assert "no such folder" in bad("push", tmp_path / "none", out)
    assert "chained URLs are not taken" in bad("pull", "simplecache::http://x/y", out, code=2)
    server.faults[INFO] = ["403"]
    secret = f"http://me:pass@{server.url[7:]}/?token=abc"
    message = bad("pull", secret, out)
    assert "access denied" in message
    assert "pass" not in message.replace("passwords", "")
    assert "abc" not in message
    server.close()
    message = bad("pull", secret, out)
    assert "tried 3 times" in message
    assert "pass@" not in message
    assert "abc" not in message
    assert not out.exists()


def test_recipe_comes_first_and_claims_the_folder(dataset: Path, out: Path) -> None:
    out.mkdir(parents=True)
    write_json(out / RECIPE, {"recipe": {}, "recipe_digest": "0" * 32})
    assert "holds another dataset (recipe.json differs)" in bad("push", dataset, out)
    assert "holds another dataset (recipe.json differs)" in bad("pull", dataset, out)
    assert [path.name for path in out.iterdir()] == [RECIPE]
