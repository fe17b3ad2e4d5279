"""The cache of a dataset elsewhere: every shard once, whole, within the bound, whoever dies."""

import fcntl
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from fractalshards.errors import FractalError, UsageError
from fractalshards.human import parse_bytes
from fractalshards.manifest import Shard, load_manifest, sample_key, shard_name, write_manifest
from fractalshards.remote import cache as cache_module
from fractalshards.remote import cache as prefetch_module
from fractalshards.remote.cache import ShardCache, fetch_ahead, open_cache, prefetching
from fractalshards.writer import write_shard

pytestmark = pytest.mark.usefixtures("impatient")
SHARDS = 6
NAMES = [shard_name("train", number) for number in range(SHARDS)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six shards of two samples, all of the same size."""
    folder = tmp_path / "source"
    folder.mkdir()
    rng = np.random.default_rng(0)
    records = []
    for number, name in enumerate(NAMES):
        pixels = [rng.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(2)]
        samples = [(sample_key(2 * number + i), (image, i)) for i, image in enumerate(pixels)]
        records.append(write_shard(folder, name, 2, samples).shard())
    traits = {"recipe": {}, "recipe_digest": "x", "label_type": "single", "classes": 2, "image_size": 16}
    write_manifest(folder, {"train": records}, **traits)
    assert len({record.bytes for record in records}) == 1
    return folder


@pytest.fixture
def size(source: Path) -> int:
    """Bytes of one shard."""
    return (source / NAMES[0]).stat().st_size


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def quiet(label: str, total: int, unit: str) -> nullcontext:
    return nullcontext(lambda count: None)


def opened(url: str, root: Path, size: int, window: int = 1) -> ShardCache:
    cache = open_cache(url, root, size, window, "train")
    cache.prepare(quiet)
    return cache


def content(cache: ShardCache, name: str) -> bytes:
    descriptor = cache.open(name)
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def here(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.folder.glob("train-*.tar")}


def run_all(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_shards_are_fetched_once(source: Path, root: Path, size: int, web: Callable) -> None:
    server = web(source)
    cache = opened(server.url, root, SHARDS * size)
    assert cache.folder == root / load_manifest(source).content_digest()
    assert here(cache) == set()
    for name in NAMES * 2:
        assert content(cache, name) == (source / name).read_bytes()
    again = opened(server.url, root, SHARDS * size)
    assert content(again, NAMES[0]) == (source / NAMES[0]).read_bytes()
    assert [server.count(name) for name in NAMES] == [1] * SHARDS
    assert server.count("train-000000.json") == 1


def test_the_shard_whose_use_is_longest_ago_makes_room(source: Path, root: Path, size: int, web: Callable) -> None:
    cache = opened(web(source).url, root, 3 * size + 10)
    for number in (0, 1, 2, 0, 3):
        cache.ensure(NAMES[number])
    assert here(cache) == {NAMES[0], NAMES[2], NAMES[3]}
    cache.ensure(NAMES[1])
    assert here(cache) == {NAMES[0], NAMES[3], NAMES[1]}


def test_an_open_shard_stays_readable_when_it_is_removed(source: Path, root: Path, size: int, web: Callable) -> None:
    cache = opened(web(source).url, root, size)
    descriptor = cache.open(NAMES[0])
    cache.ensure(NAMES[1])
    assert here(cache) == {NAMES[1]}
    with os.fdopen(descriptor, "rb") as file:
        assert file.read() == (source / NAMES[0]).read_bytes()


def test_many_threads_share_little_room(source: Path, root: Path, size: int, web: Callable) -> None:
    server = web(source)
    cache = opened(server.url, root, 2 * size)
    wrong: list[str] = []

    def read(start: int) -> None:
        for step in range(12):
            name = NAMES[(start + step) % SHARDS]
            if content(cache, name) != (source / name).read_bytes():
                wrong.append(name)
            if len(here(cache)) > 2:
                wrong.append("too much")

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    run_all(threads)
    assert wrong == []
    assert not list(cache.folder.glob(".tmp~*"))


def test_processes_that_need_the_same_shard_fetch_it_once(source: Path, root: Path, size: int, web: Callable) -> None:
    server = web(source)
    cache = opened(server.url, root, SHARDS * size)
    cache.ensure(NAMES[5])  # this process has a connection now, and the forked ones must not use it
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_read_all, args=(cache, source)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert [server.count(name) for name in NAMES] == [1] * SHARDS


def _read_all(cache: ShardCache, source: Path) -> None:
    good = all(content(cache, name) == (source / name).read_bytes() for name in NAMES)
    os._exit(0 if good else 1)


def test_a_process_killed_while_it_fetches_holds_nobody_up(source: Path, root: Path, size: int, web: Callable) -> None:
    server = web(source)
    cache = opened(server.url, root, size)  # its room is taken by what the killed one was fetching
    server.faults[NAMES[0]] = ["hang"]
    code = (
        "import sys; from pathlib import Path; from fractalshards.remote.cache import open_cache;"
        "open_cache(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), 1, 'train').ensure(sys.argv[4])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, server.url, str(root), str(size), NAMES[0]])
    assert server.hanging.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert content(cache, NAMES[1]) == (source / NAMES[1]).read_bytes()
    assert content(cache, NAMES[0]) == (source / NAMES[0]).read_bytes()
    assert opened(server.url, root, size)
    assert not list(cache.folder.glob(".tmp~*"))


def test_damage_in_the_cache_is_noticed(source: Path, root: Path, size: int, web: Callable) -> None:
    server = web(source)
    cache = opened(server.url, root, SHARDS * size)
    for name in NAMES[:3]:
        cache.ensure(name)
    with (cache.folder / NAMES[0]).open("r+b") as file:
        os.pwrite(file.fileno(), b"x", 700)
    (cache.folder / "train-000002.json").write_text("{")
    again = opened(server.url, root, SHARDS * size)
    assert here(again) == {NAMES[1], NAMES[2]}
    os.truncate(again.folder / NAMES[1], 1000)  # while it is in use
    for name in NAMES[:3]:
        assert content(again, name) == (source / name).read_bytes()
    assert [server.count(name) for name in NAMES[:3]] == [2, 2, 1]
    assert server.count("train-000002.json") == 2


def test_flipped_bits_on_the_way_and_a_server_that_goes_away(
    source: Path, root: Path, size: int, web: Callable
) -> None:
    server = web(source)
    cache = opened(server.url, root, SHARDS * size)
    server.faults = {NAMES[0]: ["flip", "cut", "503"], NAMES[1]: ["flip", "forever"]}
    assert content(cache, NAMES[0]) == (source / NAMES[0]).read_bytes()
    with pytest.raises(FractalError, match=f"{NAMES[1]}: damaged"):
        cache.ensure(NAMES[1])
    assert here(cache) == {NAMES[0]}
    server.close()
    with pytest.raises(FractalError, match=rf"{server.url}/{NAMES[2]}: .*tried 8 times"):
        cache.ensure(NAMES[2])


def test_a_cache_that_does_not_hold_a_window_is_refused(source: Path, root: Path, size: int, web: Callable) -> None:
    url = web(source).url
    with pytest.raises(UsageError, match=r"does not hold the 4 shards .* raise --cache-size"):
        open_cache(url, root, 4 * size - 1, 4, "train")
    open_cache(url, root, 4 * size, 4, "train")
    open_cache(url, root, SHARDS * size, 1000, "train")
    assert not root.exists()


def test_a_cache_larger_than_the_disk_is_refused(
    source: Path, root: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 2 * size, 2 * size))
    with pytest.raises(FractalError, match=r"a cache of .* does not fit, the disk has .* lower --cache-size"):
        opened(str(source), root, 10**9)
    opened(str(source), root, 2 * size)


def test_fetching_ahead_stays_within_the_bound_and_keeps_what_comes_next(
    source: Path, root: Path, size: int, web: Callable
) -> None:
    server = web(source)
    cache = opened(server.url, root, 3 * size)
    for number in (0, 1, 2):
        cache.ensure(NAMES[number])
    fetch_ahead(cache, [NAMES[0], NAMES[4], NAMES[5], NAMES[3]])  # 0 is needed next, though it was used first
    assert here(cache) == {NAMES[0], NAMES[4], NAMES[5]}
    assert server.count(NAMES[0]) == 1
    server.close()
    fetch_ahead(cache, [NAMES[1]])  # says nothing


def test_fetching_ahead_skips_a_shard_that_cannot_be_had(source: Path, root: Path, size: int, web: Callable) -> None:
    server = web(source)
    cache = opened(server.url, root, SHARDS * size)
    server.faults[NAMES[0]] = ["404", "forever"]
    fetch_ahead(cache, NAMES)
    assert here(cache) == set(NAMES[1:])


def test_a_new_wish_ends_the_old_one(
    source: Path, root: Path, size: int, web: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch_module, "_JOBS", 1)
    cache = opened(web(source).url, root, SHARDS * size)
    fetch_ahead(cache, NAMES, lambda: len(here(cache)) == 2)
    assert here(cache) == set(NAMES[:2])


def test_another_process_fetches_ahead_and_ends_with_this_one(
    source: Path, root: Path, size: int, web: Callable
) -> None:
    cache = opened(web(source).url, root, SHARDS * size)
    before = {*multiprocessing.active_children()}  # of tests that went before
    with prefetching(cache) as want:
        want(NAMES[:2])
        children = [*{*multiprocessing.active_children()} - before]
        assert len(children) == 1
        deadline = time.monotonic() + 60
        while here(cache) != set(NAMES[:2]):
            children[0].join(0.05)
            assert children[0].is_alive()
            assert time.monotonic() < deadline
        os.kill(children[0].pid, signal.SIGKILL)
        children[0].join()
        want(NAMES[2:])  # is not heard, and harms nobody
    assert {*multiprocessing.active_children()} <= before


def test_the_default_place_is_the_users_own(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = load_manifest(source).content_digest()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("TMPDIR", raising=False)
    assert open_cache(str(source), None, 10**9, 1, "train").folder == tmp_path / "xdg" / "fractalpretrain" / digest
    monkeypatch.setenv("TMPDIR", str(tmp_path / "job"))
    default = tmp_path / "job" / f"fractalpretrain-{os.getuid()}"
    assert open_cache(str(source), None, 10**9, 1, "train").folder == default / digest
    assert stat.S_IMODE(default.stat().st_mode) == 0o700


@pytest.mark.parametrize("prepared", ["open to all", "a link", "of somebody else"])
def test_a_default_place_that_somebody_prepared_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: str
) -> None:
    """Shards could be swapped there after they were hashed."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder = tmp_path / f"fractalpretrain-{os.getuid()}"
    if prepared == "a link":
        folder.symlink_to(source)
    else:
        folder.mkdir()
        folder.chmod(0o777 if prepared == "open to all" else 0o700)
    if prepared == "of somebody else":
        uid = os.getuid()
        folder.rename(tmp_path / f"fractalpretrain-{uid + 1}")
        monkeypatch.setattr(cache_module.os, "getuid", lambda: uid + 1)
    with pytest.raises(FractalError, match=r"other users can write there, .* choose a --cache-dir"):
        open_cache(str(source), None, 10**9, 1, "train")


@pytest.mark.parametrize("threads", [2, 4])
def test_room_for_one_shard_is_enough_for_many(
    source: Path, root: Path, size: int, web: Callable, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Even if whoever fetched a shard is held up before letting go of its lock."""
    cache = opened(web(source).url, root, size)
    fetch, wrong = ShardCache._fetch, []

    def fetch_and_dawdle(self: ShardCache, shard: Shard, lock: int) -> None:
        fetch(self, shard, lock)
        time.sleep(0.02)  # as a busy machine does

    def read(start: int) -> None:
        try:
            for step in range(4):
                name = NAMES[(start + step) % SHARDS]
                if content(cache, name) != (source / name).read_bytes() or len(here(cache)) > 1:
                    wrong.append(name)
        except FractalError as error:
            wrong.append(str(error))

    monkeypatch.setattr(ShardCache, "_fetch", fetch_and_dawdle)
    run_all([threading.Thread(target=read, args=(start,)) for start in range(threads)])
    assert wrong == []


def test_a_damaged_shard_makes_room_for_itself(source: Path, root: Path, size: int, web: Callable) -> None:
    cache = opened(web(source).url, root, size)
    cache.ensure(NAMES[0])
    os.truncate(cache.folder / NAMES[0], 1000)
    run_all([threading.Thread(target=cache.ensure, args=(NAMES[0],), daemon=True)])
    assert content(cache, NAMES[0]) == (source / NAMES[0]).read_bytes()


@pytest.mark.parametrize("room", [1, 2])
def test_what_arrives_while_room_is_sought_counts_once(
    source: Path, root: Path, size: int, web: Callable, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    server = web(source)
    cache = opened(server.url, root, room * size)
    server.faults[NAMES[0]] = ["hang"]
    first = threading.Thread(target=cache.ensure, args=(NAMES[0],))
    first.start()
    assert server.hanging.wait(60)

    def arriving_after(look: Callable) -> Callable:
        def looked(self: ShardCache) -> list:
            found = list(look(self))
            server.let_go.set()
            first.join(60)
            return found

        return looked

    monkeypatch.setattr(ShardCache, "_here", arriving_after(ShardCache._here))
    monkeypatch.setattr(ShardCache, "_coming", arriving_after(ShardCache._coming))
    removed = []
    remove = ShardCache._remove
    monkeypatch.setattr(ShardCache, "_remove", lambda self, path: removed.append(path.name) or remove(self, path))
    cache.ensure(NAMES[1])
    assert here(cache) == set(NAMES[2 - room : 2])
    assert set(removed) == set(NAMES[: 2 - room])


def test_locks_are_not_inherited(source: Path, root: Path, size: int) -> None:
    """A program started meanwhile would hold them on."""
    cache = opened(str(source), root, SHARDS * size)
    descriptor = cache.open(NAMES[0])
    assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(descriptor)


@pytest.mark.parametrize(
    ("text", "size"), [("20GB", 20 * 10**9), ("1.5 mb", 1_500_000), ("1GiB", 1 << 30), ("700", 700), ("2k", 2000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text, "--cache-size") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1PB", "ten", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"--cache-size .*: expected a size such as 20GB"):
        parse_bytes(text, "--cache-size")
