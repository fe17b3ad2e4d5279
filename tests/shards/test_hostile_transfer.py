"""Broken and hostile datasets, pushed and pulled: one line says what is wrong, nothing hangs and little is held.

Some of each kind of damage in ``test_hostile``; what is in the images and labels is for ``verify`` to find.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from fractalshards.cli import main
from fractalshards.manifest import INFO, RECIPE, SYSTEMS
from fractalshards.remote import transfer as pull_module
from fractalshards.remote.stores import Upload

SHARD, SIDECAR = "train-000001.tar", "train-000001.json"
MEMORY = 1500  # megabytes, the bound that shards/README.md states
LISTS = "[" + "[]," * 5_000_000 + "[]]"  # 15 MB, of which the parser makes 400
Damage = Callable[[Path], object]


def pipe(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def device(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")

    return damage


def whole(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def more(name: str, field: str, text: str) -> Damage:
    """A JSON file with one more field, or another value of one."""
    return lambda folder: (folder / name).write_text(
        json.dumps({k: v for k, v in json.loads((folder / name).read_text()).items() if k != field})[:-1]
        + f', "{field}": {text}}}'
    )


def bomb(folder: Path) -> None:
    with zipfile.ZipFile(folder / SYSTEMS, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("00000.npy", bytes(200 << 20))


CASES = {
    "pipe for a shard": (pipe(SHARD), f"{SHARD}: not a regular file"),
    "device for a shard": (device(SHARD), f"{SHARD}: not a regular file"),
    "pipe for a sidecar": (pipe(SIDECAR), SIDECAR),
    "device for a sidecar": (device(SIDECAR), SIDECAR),
    "pipe for the recipe": (pipe(RECIPE), f"{RECIPE}: not a regular file"),
    "device for the recipe": (device(RECIPE), f"{RECIPE}: not a regular file"),
    "pipe for the systems": (pipe(SYSTEMS), f"{SYSTEMS}: not a regular file"),
    "pipe for the manifest": (pipe(INFO), INFO),
    "device for the manifest": (device(INFO), INFO),
    "20 MB for the manifest": (whole(INFO, " " * 20_000_000), f"{INFO}: larger than 16 MiB"),
    "20 MB for the recipe": (whole(RECIPE, " " * 20_000_000), f"{RECIPE}: larger than 16 MiB"),
    "20 MB for a sidecar": (whole(SIDECAR, " " * 20_000_000), SIDECAR),
    "a sidecar of lists": (whole(SIDECAR, LISTS[-100_000:]), SIDECAR),
    "a recipe 500 deep": (more(RECIPE, "recipe", '{"a": ' + "[" * 500 + "]" * 500 + "}"), "nested more than 32 deep"),
    "an infinite number": (more(INFO, "recipe", '{"n": 1e999}'), INFO),
    "4000 digits": (more(SIDECAR, "samples", "1" * 4000), SIDECAR),
    "systems that inflate": (bomb, f"{SYSTEMS}: damaged"),
}


@pytest.mark.parametrize("command", ["push", "pull"])
@pytest.mark.parametrize("case", CASES)
def test_hostile(case: str, command: str, dataset: Path, tmp_path: Path) -> None:
    damage, words = CASES[case]
    damage(dataset)
    out = tmp_path / "out"
    result = CliRunner().invoke(main, [command, str(dataset), str(out)])
    assert result.exit_code == 1, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert words in line
    assert len(line) < 1000
    assert not (out / INFO).exists()


@pytest.mark.parametrize("name", [INFO, RECIPE, SYSTEMS, SHARD, SIDECAR])
def test_pipes_where_a_part_is_already(name: str, dataset: Path, tmp_path: Path) -> None:
    """A destination that somebody else prepared."""
    out = tmp_path / "out"
    shutil.copytree(dataset, out)
    pipe(name)(out)
    for command in ("push", "pull"):
        result = CliRunner().invoke(main, [command, str(dataset), str(out)])
        assert result.exit_code == 0 or "not a regular file" in result.stderr, result.output


MEASURE = """
import resource, subprocess, sys
command = [sys.executable, "-c", "from fractalshards.cli import main; main()", *sys.argv[1:]]
result = subprocess.run(command, capture_output=True, text=True)
print(result.stderr, result.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, sep="\\n")
"""


@pytest.mark.parametrize(
    ("command", "bombs", "most", "code"),
    [("pull", [INFO], MEMORY, "1"), ("push", [SIDECAR, "train-000000.json"], 700, "1")],
)
def test_memory_is_bounded(dataset: Path, tmp_path: Path, command: str, bombs: list[str], most: int, code: str) -> None:
    for name in bombs:
        more(name, "software", f'{{"x": {LISTS}}}')(dataset)
    words = [sys.executable, "-c", MEASURE, command, str(dataset), str(tmp_path / "out")]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    *_, found, kilobytes = result.stdout.splitlines()
    assert found == code
    assert int(kilobytes) // 1000 < most


def test_a_file_that_grows_while_it_is_sent(tmp_path: Path) -> None:
    """No more bytes than promised are read."""
    path = tmp_path / "f.tar"
    path.write_bytes(b"x" * 1000)
    upload = Upload.of_file(path)
    assert upload.told.sha256 == hashlib.sha256(b"x" * 1000).hexdigest()
    pieces = upload.pieces()
    path.write_bytes(b"x" * 2000)
    with pytest.raises(Exception, match=r"f\.tar: not what the manifest says"):
        list(pieces)


def test_two_pulls_that_begin_at_once(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one publishes its recipe just after this one found none."""
    out = tmp_path / "out"
    real = pull_module.atomic_file

    def late(path: Path, exclusive: bool = False) -> object:
        if exclusive:
            shutil.copy(dataset / RECIPE, path)
        return real(path, exclusive)

    monkeypatch.setattr(pull_module, "atomic_file", late)
    result = CliRunner().invoke(main, ["pull", str(dataset), str(out)])
    assert result.exit_code == 0, result.output
    assert (out / INFO).read_bytes() == (dataset / INFO).read_bytes()
