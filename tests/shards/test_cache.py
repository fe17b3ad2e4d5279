"""The cache of a remote dataset: every shard once, whole, within the bound, even if processes die."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

from building import children_of, is_running, wait_until
from damages import overwrite
from fractalshards.errors import FractalError, UsageError
from fractalshards.manifest import shard_name
from fractalshards.remote.cache import ShardCache, open_cache, prefetching
from packing import write_small

pytestmark = pytest.mark.usefixtures("impatient")
FORK = multiprocessing.get_context("fork")
SHARDS = 6
NAMES = [shard_name("train", number) for number in range(SHARDS)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six shards of two samples, all of the same size."""
    folder = write_small(tmp_path / "source", [0, 1] * SHARDS, 2)
    assert len({path.stat().st_size for path in folder.glob("*.tar")}) == 1
    return folder


@pytest.fixture
def size(source: Path) -> int:
    """Bytes of one shard."""
    return (source / NAMES[0]).stat().st_size


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(url: str, root: Path, size: int) -> ShardCache:
    cache = open_cache(url, root, size, 1, "train")
    cache.prepare()
    return cache


def read(cache: ShardCache, source: Path, *numbers: int) -> None:
    for number in numbers:
        with os.fdopen(cache.open(NAMES[number]), "rb") as file:
            assert file.read() == (source / NAMES[number]).read_bytes()


def here(cache: ShardCache) -> set[str]:
    return {path.name for path in cache.folder.glob("train-*.tar")}


def test_cache_removes_the_least_recently_used_shard(source, root, size, web):
    cache = opened(web(source).url, root, 3 * size + 10)
    read(cache, source, 0, 1, 2, 0, 3)
    assert here(cache) == {NAMES[0], NAMES[2], NAMES[3]}
    descriptor = cache.open(NAMES[2])
    assert not os.get_inheritable(descriptor)
    read(cache, source, 0, 1, 4)
    assert NAMES[2] not in here(cache)
    with os.fdopen(descriptor, "rb") as file:  # it stays readable
        assert file.read() == (source / NAMES[2]).read_bytes()


def test_cache_of_another_user(source, root, size, monkeypatch):
    cache = opened(str(source), root, 3 * size)
    monkeypatch.setattr(os, "utime", Mock(side_effect=PermissionError))  # only the owner may set the time of a file
    read(cache, source, 0, 0)


def test_cache_shared_by_threads_with_little_room(source, root, size, web):
    cache = opened(web(source).url, root, 2 * size)

    def work(start: int) -> None:
        for step in range(8):
            read(cache, source, (start + step) % SHARDS)
            assert len(here(cache)) <= 2

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(work, range(4), timeout=60)] == [None] * 4
    assert not list(cache.folder.glob(".tmp~*"))


def test_cache_fetches_a_shard_once_for_all_processes(source, root, size, web):
    server = web(source)
    cache = opened(server.url, root, SHARDS * size)
    read(cache, source, 5)  # this process has a connection now, which the forked ones must not use
    processes = [FORK.Process(target=read, args=(cache, source, *range(SHARDS))) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    read(opened(server.url, root, SHARDS * size), source, 0)
    assert [server.count(name) for name in (*NAMES, "train-000000.json")] == [1] * (SHARDS + 1)


def test_cache_survives_a_killed_process(source, root, size, web):
    server = web(source)
    cache = opened(server.url, root, size)  # its room is taken by what the killed one was fetching
    server.faults[NAMES[0]] = ["hang"]
    process = FORK.Process(target=cache.open, args=(NAMES[0],))
    process.start()
    assert server.hanging.wait(60)
    process.kill()
    process.join()
    read(cache, source, 1, 0)
    assert opened(server.url, root, size)
    assert not list(cache.folder.glob(".tmp~*"))


def test_cache_notices_damage(source, root, size, web):
    server = web(source)
    cache = opened(server.url, root, 3 * size)
    read(cache, source, 0, 1, 2)
    overwrite(cache.folder / NAMES[0], 700, b"x")
    (cache.folder / "train-000002.json").write_text("{")
    again = opened(server.url, root, 3 * size)
    assert here(again) == {NAMES[1], NAMES[2]}
    os.truncate(again.folder / NAMES[1], 1000)  # while it is in use
    read(again, source, 0, 1, 2)
    assert [server.count(name) for name in NAMES[:3]] == [2, 2, 1]
    assert server.count("train-000002.json") == 2


def test_cache_holds_a_window_and_fits(source, root, size, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(root.with_name("job")))
    folder = open_cache(str(source), None, 10**9, 1, "train").folder
    assert folder.parent == root.with_name("job") / f"fractalpretrain-{os.getuid()}"
    with pytest.raises(UsageError, match="--cache-size"):
        open_cache(str(source), root, 4 * size - 1, 4, "train")
    open_cache(str(source), root, 4 * size, 4, "train")
    open_cache(str(source), root, SHARDS * size, 1000, "train")
    assert not root.exists()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: (10**9, 10**9 - 2 * size, 2 * size))
    with pytest.raises(FractalError, match="--cache-dir"):
        opened(str(source), root, 10**9)
    opened(str(source), root, 2 * size)


def test_prefetching_keeps_the_next_shards(source, root, size, web):
    server = web(source)
    cache = opened(server.url, root, 3 * size)
    read(cache, source, 0, 1, 2)
    server.faults[NAMES[5]] = ["404", "forever"]
    with prefetching(cache, "train") as want:
        want([0, 4, 5, 3])  # 0 is needed next, though it was used first
        wait_until(lambda: NAMES[4] in here(cache) and server.count(NAMES[5]) == 1)
        assert NAMES[0] in here(cache)
    assert (server.count(NAMES[0]), server.count(NAMES[3])) == (1, 0)


def test_prefetching_ends_with_its_parent(source, root, size):
    cache, before = opened(str(source), root, SHARDS * size), {*children_of()}
    with prefetching(cache, "train") as want:
        want([0, 1])
        (child,) = {*children_of()} - before
        wait_until(lambda: here(cache) == set(NAMES[:2]))
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: not is_running(child))
        want(range(2, SHARDS))  # harms nobody
    assert {*children_of()} <= before

    def hold() -> None:
        with prefetching(cache, "train") as want:
            want(range(2, SHARDS))
            time.sleep(60)

    parent = FORK.Process(target=hold)
    parent.start()
    wait_until(lambda: here(cache) == set(NAMES))
    (child,) = children_of(parent.pid)
    parent.kill()
    parent.join()
    wait_until(lambda: not is_running(child))
