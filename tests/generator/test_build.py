"""Building: the same content whoever builds it, killed or not; nothing half-done looks finished."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fractalgen import draw_systems, make_recipe, render_sample
from fractalgen.build import Plan, plan_build, run_build
from fractalgen.cli import main
from fractalgen.executors import open_engine
from fractalshards.errors import FractalError
from fractalshards.manifest import load_manifest
from fractalshards.reader import index_split, iterate_shard
from fractalshards.sample import decode_label

FRACTALGEN = Path(sys.executable).with_name("fractalgen")
SMALL = ["--kind", "single", "--n", "110", "--val", "13", "--classes", "20", "--size", "32", "--points", "3000"]
SMALL += ["--shard-size", "25"]


def build(
    out: Path, *options: str, workers: int = 1, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [FRACTALGEN, "build", *SMALL, *options, "--out", out, "--workers", str(workers)]
    return subprocess.run(
        command, text=True, capture_output=True, env={**os.environ, **(environment or {})}, timeout=240
    )


def finish(plan: Plan) -> tuple[str, ...]:
    with open_engine(1) as engine:
        return run_build(plan, engine.executor)


def content(folder: Path) -> dict[str, str]:
    manifest = load_manifest(folder)
    return {shard.name: shard.content_digest for shards in manifest.splits.values() for shard in shards}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_describes_itself(built: Path) -> None:
    shards = [*(f"train-00000{i}" for i in range(5)), "val-000000"]
    expected = [
        "_info.json",
        "recipe.json",
        "systems.npz",
        *(f"{shard}.{end}" for shard in shards for end in ("json", "tar")),
    ]
    assert names(built) == sorted(expected)
    recipe = json.loads((built / "recipe.json").read_text())
    manifest = load_manifest(built)
    assert recipe["recipe"] == manifest.recipe
    assert recipe["recipe_digest"] == manifest.recipe_digest
    assert (manifest.samples("train"), manifest.samples("val"), manifest.classes) == (110, 13, 20)
    assert manifest.software["numba"]


def test_classes_are_balanced_and_keys_count_up(built: Path) -> None:
    manifest = load_manifest(built)
    for split, first in (("train", 0), ("val", 110)):
        samples = [sample for shard in index_split(manifest, split) for sample in iterate_shard(shard)]
        assert [sample.key for sample in samples] == [f"{first + i:09d}" for i in range(len(samples))]
        counts = Counter(decode_label(sample.files) for sample in samples)
        assert max(counts.values()) - min(counts[label] for label in range(20)) <= 1


def test_two_workers_build_the_same(built: Path, tmp_path: Path) -> None:
    assert build(tmp_path / "two", workers=2).returncode == 0
    assert content(tmp_path / "two") == content(built)


def test_running_again_does_nothing(built: Path, tmp_path: Path) -> None:
    out = shutil.copytree(built, tmp_path / "again")
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    result = build(out)
    assert result.returncode == 0
    assert "nothing to render, all 6 shards there already" in result.stderr
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_only_what_is_missing_or_damaged_is_rendered(built: Path, tmp_path: Path) -> None:
    out = shutil.copytree(built, tmp_path / "gaps")
    (out / "train-000001.json").unlink()
    (out / "train-000003.tar").unlink()
    os.truncate(out / "val-000000.tar", 700)
    kept = (out / "train-000000.tar").stat().st_mtime_ns
    result = build(out)
    assert result.returncode == 0
    assert "to render: 63 images" in result.stderr
    assert content(out) == content(built)
    assert (out / "train-000000.tar").stat().st_mtime_ns == kept


def test_another_recipe_is_refused_and_named(built: Path, tmp_path: Path) -> None:
    out = shutil.copytree(built, tmp_path / "other")
    before = names(out)
    result = build(out, "--seed", "1", "--set", "blur_probability=0")
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert "seed 0 there, 1 here" in line
    assert "blur_probability 0.5 there, 0.0 here" in line
    assert names(out) == before


def wait_for(condition: object, process: subprocess.Popen[Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the build ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def running_in(group: int) -> list[str]:
    listing = subprocess.run(["ps", "-o", "pid=,stat=", "-g", str(group)], text=True, capture_output=True).stdout
    return [line for line in listing.splitlines() if "Z" not in line.split()[1]]


def test_killed_half_way_it_continues_to_the_same_dataset(tmp_path: Path) -> None:
    slow = ["--n", "240", "--points", "1000000"]
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "killed"
    assert build(undisturbed, *slow, workers=2).returncode == 0
    command = [FRACTALGEN, "build", *SMALL, *slow, "--out", out, "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(lambda: len(list(out.glob("train-*.json"))) >= 1, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while running_in(process.pid):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.02)
    assert not (out / "_info.json").exists()
    done = len(list(out.glob("*-*.json")))
    assert 1 <= done < 11
    (out / f".tmp~{os.uname().nodename}~{process.pid}~00000000~train-000004.tar").write_bytes(b"half")
    result = build(out, *slow)
    assert result.returncode == 0, result.stderr
    assert "done)" in result.stderr
    assert names(out) == names(undisturbed)
    assert content(out) == content(undisturbed)


def test_sigterm_ends_as_ctrl_c_does(tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    command = [FRACTALGEN, "build", *SMALL, "--points", "1000000", "--n", "240", "--out", out, "--workers", "1"]
    process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: len(list(out.glob("train-*.json"))) >= 1, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143
    stopping, last = errors.splitlines()[-2:]
    assert "Ctrl-C again" in stopping
    assert last == f"error: {out}: stopped; finished shards are kept, run the same command again to go on"
    assert not (out / "_info.json").exists()
    assert not [name for name in names(out) if name.startswith(".")]


def test_of_two_recipes_in_one_new_folder_one_wins(tmp_path: Path) -> None:
    out = tmp_path / "contested"
    slow, fast = (make_recipe("single", 40, classes=20, size=32, points=100, seed=seed) for seed in (0, 1))
    plan = plan_build(out, slow, 1)
    finish(plan_build(out, fast, 1))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(FractalError, match="seed 1 there, 0 here"):
        finish(plan)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_systems_lost_between_recipe_and_systems_are_drawn_again(built: Path, tmp_path: Path) -> None:
    out = tmp_path / "early"
    out.mkdir()
    shutil.copy(built / "recipe.json", out)
    assert build(out).returncode == 0
    assert content(out) == content(built)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--kind", "fractl"], 2, "unknown kind"),
        (["--n", "0"], 2, "n is 0"),
        (["--n", "5"], 2, "fewer images than the 20 classes"),
        (["--n", "many"], 2, "'many' is not a valid integer"),
        (["--size", "8"], 2, "size is 8"),
        (["--workers", "0"], 2, "--workers is '0'"),
        (["--set", "maps"], 2, "expected NAME=VALUE"),
        (["--set", "mops=2,3"], 2, "did you mean 'maps'"),
        (["--sead", "1"], 2, "No such option '--sead'"),
        (["--out", "/proc/nowhere"], 1, "/proc/nowhere"),
        (["--out", __file__], 1, "not a file"),
        (["--size", "2048", "--n", "99999999", "--shard-size", "99999"], 1, "free some space"),
    ],
    ids=str,
)
def test_bad_input_ends_in_one_line(options: list[str], code: int, words: str, tmp_path: Path) -> None:
    command = ["build", *SMALL, "--out", str(tmp_path / "out"), "--workers", "1", *options]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == code, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.stderr.rstrip().endswith(line)
    assert words in line
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_dataset_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    result = build(tmp_path)
    assert result.returncode == 1
    assert "holds 'thesis.tex' but no recipe.json" in result.stderr
    assert names(tmp_path) == ["thesis.tex"]


def test_damaged_systems_are_refused(built: Path, tmp_path: Path) -> None:
    out = shutil.copytree(built, tmp_path / "damaged")
    data = bytearray((out / "systems.npz").read_bytes())
    data[300] ^= 1
    (out / "systems.npz").write_bytes(data)
    (out / "_info.json").unlink()
    result = build(out)
    assert result.returncode == 1
    assert "systems.npz" in result.stderr
    assert not (out / "_info.json").exists()


@pytest.fixture
def nobody() -> Iterator[None]:
    """Root may write anywhere; for a while this process is a user who may not."""
    recipe = make_recipe("single", 1, classes=1, size=32)
    render_sample(recipe, draw_systems(recipe), 0)  # whatever is imported late, nobody may not be able to read
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_without_write_permission(nobody: None) -> None:
    result = CliRunner().invoke(main, ["build", *SMALL, "--out", "/usr/share/fractals", "--workers", "1"])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "error: /usr/share: Permission denied; choose a folder you may read and write"
    )


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(small_disk: Path) -> None:
    result = build(small_disk / "out", "--n", "1000")
    assert result.returncode == 1
    assert "the disk has" in result.stderr.splitlines()[-1]
    assert names(small_disk) == []


def test_a_disk_that_fills_up_leaves_nothing_that_looks_finished(built: Path, small_disk: Path) -> None:
    out = small_disk / "out"
    recipe = make_recipe("single", 110, val=13, classes=20, size=32, points=3000, shard_size=25)
    plan = plan_build(out, recipe, 1)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(350_000))
    with pytest.raises(OSError, match="No space left on device") as caught:
        finish(plan)
    assert caught.value.filename.startswith(str(out))
    assert not (out / "_info.json").exists()
    assert not [name for name in names(out) if name.startswith(".")]
    filler.unlink()
    finish(plan_build(out, recipe, 1))
    assert content(out) == content(built)
    assert names(out) == names(built)
