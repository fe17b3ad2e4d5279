"""Commands in odd surroundings: somebody's modules in the current folder, no home, a small /dev/shm, closed streams."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
BUILD = (
    "fractalgen build --kind single --n 40 --classes 5 --size 32 --points 2000 --shard-size 20 --workers 2 --out NEW"
)
PRETRAIN = "fractaltrain pt --shards SHARDS --model test_resnet --image-size 32 --batch-size 10 --epochs 1 --out NEW"
STUDY = """
[study]
image_size = 32
pretraining = {{ epochs = 1, batch_size = 10 }}
finetuning = {{ epochs = 1, batch_size = 10 }}
[models.test_resnet]
[pretraining.a]
shards = "{0}"
[finetuning.b]
data = "shards:{0}"
"""
NOBODY = 54321  # a user without an account, who may read everything: the environment of these tests, too
AS_NOBODY = f"setpriv --reuid {NOBODY} --clear-groups --inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
HOME = ("HOME", "XDG_CACHE_HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "MPLCONFIGDIR", "NUMBA_CACHE_DIR")


def slow(*arguments: str) -> object:
    return pytest.param(*arguments, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def shards(tmp_path_factory, image_folder):
    """Thirty images to train on, twenty to validate."""
    folder = tmp_path_factory.mktemp("surroundings")
    images = image_folder(folder / "images", {"a": 25, "b": 25})
    command = [BIN / "fractalshards", "pack", f"imagefolder:{images}", folder / "shards", "--split=train=0.6,val=0.4"]
    subprocess.run(command, check=True, capture_output=True)
    (folder / "study.toml").write_text(STUDY.format(folder / "shards"))
    return folder / "shards"


def run(
    command: str, folder: Path, shards: str | Path, before: Sequence[str] = (), new: str = "new", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command, perhaps through another one, without what the runner of these tests adds to the environment."""
    program, *arguments = (word.replace("SHARDS", str(shards)).replace("NEW", new) for word in command.split())
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONIOENCODING")}
    return subprocess.run(
        [*before, BIN / program, *arguments],
        cwd=folder, env=kept | environment, text=True, errors="surrogateescape", capture_output=True, timeout=280,
    )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        "fractalshards verify SHARDS",
        slow(BUILD),
        slow(f"{PRETRAIN} --nproc 2 --workers 1"),
        slow("fractaltrain study SHARDS/../study.toml --out NEW"),
        slow(f"{PRETRAIN.replace('SHARDS', 'URL')} --cache-dir cache"),
    ],
)
def test_nothing_in_the_current_folder_is_run(shards, tmp_path, web, command):
    for name in ("signal", "threading", "socket", "random", "pickle"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\n")
    (tmp_path / ".numba_config.yaml").write_text("cache_dir: ran\n")
    command = command.replace("URL", f"{web(shards.parent).url}/shards")
    done = run(command, tmp_path, shards)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", ["fractalshards verify SHARDS --workers 1", slow(f"{PRETRAIN} --workers 2")])
@pytest.mark.parametrize("limit", [3, 4])  # what is missing is a worker process, or a thread of it
def test_limit_of_processes_is_one_line(nobodys, command, limit):
    folder, before = nobodys
    limited = [*before, "bash", "-c", f'ulimit -u {limit}; exec "$@"', "bash"]
    done = run(command, folder, "shards", limited, TMPDIR=str(folder), PYTHONDONTWRITEBYTECODE="1")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(errors)) == (1, 1), done.stderr
    # a thread more or less at that moment decides whether the command meets the limit, or a loader worker of PyTorch
    worker = "loader worker" in errors[0] and "can't start new thread" in done.stderr
    assert "ulimit -u" in errors[0] or worker, done.stderr


def test_current_folder_that_is_gone_is_one_line(shards, tmp_path):
    (tmp_path / "gone").mkdir()
    done = run("fractalshards verify SHARDS", tmp_path / "gone", shards, ["sh", "-c", 'rmdir ../gone; exec "$@"', "sh"])
    assert (done.returncode, done.stderr.count("\n"), "folder" in done.stderr) == (1, 1, True)


@pytest.fixture
def nobodys(shards):
    """A folder with ``shards``, and the beginning of commands that run as its owner, without account and home."""
    command = [*AS_NOBODY.split(), "env", *(word for name in HOME for word in ("-u", name))]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to become another user")
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, NOBODY, -1)
        shutil.copytree(shards, Path(name) / "shards")
        yield Path(name), command


@pytest.mark.parametrize(
    "command", ["fractalgen kinds", "fractalshards verify shards", "fractalshards pull shards NEW", slow(PRETRAIN)]
)
def test_user_without_account_and_home(nobodys, command):
    folder, before = nobodys
    done = run(command, folder, "shards", before, TMPDIR=str(folder), PYTHONDONTWRITEBYTECODE="1")
    assert (done.returncode, "Matplotlib" in done.stderr) == (0, False), done.stderr
    assert not (folder / "~").exists()
    assert stat.S_IMODE((folder / f"fractalpretrain-{NOBODY}").stat().st_mode) == 0o700


@pytest.mark.parametrize("command", ["fractalgen kinds", "fractalshards verify shards"])
def test_user_without_any_place_for_a_cache(nobodys, command):
    folder, before = nobodys
    done = run(command, folder, "shards", [*before, "HOME=/"], TMPDIR="/nowhere", PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["shards"]


def with_dev_shm(options: str) -> list[str]:
    """Return the beginning of a command line that runs with another file system in /dev/shm."""
    command = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o {options} tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    return command


@pytest.mark.parametrize("command", ["fractalshards verify SHARDS", slow(BUILD)])
def test_workers_need_no_dev_shm(shards, tmp_path, command):
    done = run(command, tmp_path, shards, with_dev_shm("ro"))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_read_only_dev_shm_is_named(shards, tmp_path):
    done = run(f"{PRETRAIN} --workers 1", tmp_path, shards, with_dev_shm("ro"))
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith(("note: ", "new: "))]
    assert (done.returncode, line.startswith("error: "), "/dev/shm" in line) == (1, True, True)


@pytest.mark.parametrize(
    ("command", "closed", "printed"),
    [
        ("fractalshards verify SHARDS", ">&- 2>&- <&-", False),
        ("fractalshards pull SHARDS NEW", "2>&-", True),
        slow(BUILD, "2>&-", True),
        slow(f"{PRETRAIN} --nproc 2", ">&- 2>&-", False),
        slow(f"{PRETRAIN} --nproc 2", "2>&-", True),
    ],
)
def test_closed_streams_and_a_name_that_is_not_utf_8(shards, tmp_path, command, closed, printed):
    name = os.fsdecode(b"o\xffut")
    done = run(command, tmp_path, shards, ["sh", "-c", f'exec "$@" {closed}', "sh"], name)
    assert (done.returncode, done.stderr, r"o\udcffut" in done.stdout) == (0, "", printed)
    assert [path.name for path in tmp_path.iterdir()] == ([name] if "NEW" in command else [])
