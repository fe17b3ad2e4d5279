"""Atomic files, leftovers of killed writers, and typed JSON."""

import errno
import json
import os
import socket
import stat
import subprocess
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fractalshards.errors import FractalError
from fractalshards.storage import atomic_file, parse_json, private_cache, remove_leftovers, write_bytes


def leftover(folder: Path, host: str, process: int, age: float = 0.0, unique: str = "abcdef01") -> Path:
    path = folder / f".tmp~{host}~{process}~{unique}~train-000000.tar"
    path.write_bytes(b"half")
    os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    return path


@pytest.mark.parametrize("name", ["a.json", "a" * 255, "日" * 85], ids=len)
def test_atomic_file_appears_when_it_is_whole(tmp_path, name):
    target = tmp_path / name
    with atomic_file(target) as last, atomic_file(target) as first:
        first.write(b"first")
        last.write(b"whole")
        assert not target.exists()
        mark = f".tmp~{socket.gethostname()}~{os.getpid()}~"
        assert [path.name[: len(mark)] for path in tmp_path.iterdir()] == [mark, mark]
    assert [(path, path.read_bytes()) for path in tmp_path.iterdir()] == [(target, b"whole")]


@pytest.mark.parametrize(
    ("environment", "scratch", "found"),
    [
        ({"XDG_CACHE_HOME": "x", "HOME": "h", "TMPDIR": "t"}, False, "x/fractalpretrain"),
        ({"XDG_CACHE_HOME": "x", "HOME": "h", "TMPDIR": "t"}, True, "t/fractalpretrain-UID"),
        ({"HOME": "h"}, True, "h/.cache/fractalpretrain"),
        ({"HOME": "/proc/nowhere", "TMPDIR": "t"}, False, "t/fractalpretrain-UID"),
        ({"XDG_CACHE_HOME": "/proc/nowhere", "TMPDIR": "t"}, False, "t/fractalpretrain-UID"),
        ({"HOME": "h", "TMPDIR": "/proc/nowhere"}, True, "h/.cache/fractalpretrain"),
        ({"HOME": "/proc/nowhere", "TMPDIR": "/proc/nowhere"}, False, None),
    ],
)
def test_private_cache_is_in_the_first_place_that_can_be_written(tmp_path, monkeypatch, environment, scratch, found):
    for name in ("XDG_CACHE_HOME", "HOME", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, folder in environment.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    expected = None if found is None else tmp_path / found.replace("UID", str(os.getuid()))
    assert private_cache(scratch) == expected
    assert expected is None or stat.S_IMODE(expected.stat().st_mode) == 0o700


@pytest.mark.parametrize("prepared", ["open to all", "a link", "of somebody else"])
def test_private_cache_belongs_to_the_user(tmp_path, monkeypatch, prepared):
    """Where others can write, shards could be swapped after they were hashed."""
    uid = os.getuid() + (prepared == "of somebody else")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: uid)
    folder = tmp_path / f"fractalpretrain-{uid}"
    if prepared == "a link":
        folder.symlink_to("/tmp")
    else:
        folder.mkdir()
        folder.chmod(0o777 if prepared == "open to all" else 0o700)
    with pytest.raises(FractalError, match="--cache-dir"):
        private_cache(scratch=True)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_atomic_file_without_links_or_fsync(tmp_path, monkeypatch, code):
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", Mock(side_effect=OSError(code, os.strerror(code))))
    with atomic_file(tmp_path / "a", exclusive=True) as file:
        file.write(b"first")
    with pytest.raises(FileExistsError), atomic_file(tmp_path / "a", exclusive=True) as file:
        file.write(b"second")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"first")]


@pytest.mark.parametrize("remove", [remove_leftovers, lambda folder: write_bytes(folder / "train-000000.tar", b"")])
def test_remove_leftovers_of_dead_writers(tmp_path, monkeypatch, remove):
    ended, unreaped = (subprocess.Popen(["true"]) for _ in range(2))
    ended.wait()
    os.waitid(os.P_PID, unreaped.pid, os.WEXITED | os.WNOWAIT)
    here = socket.gethostname()
    whole = tmp_path / "train-000000.tar"
    whole.write_bytes(b"whole")
    for process in (ended, unreaped):
        leftover(tmp_path, here, process.pid)
    leftover(tmp_path, "other-host", 1, age=7200)
    kept = {whole, leftover(tmp_path, here, os.getpid()), leftover(tmp_path, "other~host", 1)}
    kept |= {leftover(tmp_path, here, ended.pid, unique="abcdef01.1")}  # of a container with the same host name
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 7200)  # the clock of the file server is slow
    remove(tmp_path)
    assert set(tmp_path.iterdir()) == kept
    unreaped.wait()


def test_remove_leftovers_spares_processes_of_other_users(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "kill", Mock(side_effect=PermissionError))
    kept = leftover(tmp_path, socket.gethostname(), 999999999)  # not in /proc, which may hide it
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize("lists", ["[" * 30 + r'"[[\"[["' + "]" * 30, "[],[{}]"])
def test_parse_json_is_that_of_json(lists):
    data = b'{"a": [%s], "b": -0.1e-7, "c": "\\u00e9"}' % lists.encode()
    assert parse_json(data, dict[str, Any], "here") == json.loads(data)


@pytest.mark.parametrize(
    "value",
    [b"NaN", b"Infinity", b"1e999", b"1} x", b'"\xff"', b"[" * 32 + b"]" * 32, b"[" * 10**7, b"[" + b"[]," * 10**7],
)
def test_parse_json_rejects(value):
    with pytest.raises(FractalError, match="here"):
        parse_json(b'{"a": ' + value + b"}", dict[str, Any], "here")
