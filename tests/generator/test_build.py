"""``fractalgen build`` and ``repair``: killed, concurrent or repaired, it is the same dataset, visible when whole."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from building import RECIPE, SMALL, files, names, run, succeed, times, wait_until, workers_of
from damages import edit, overwrite
from fractalgen import make_recipe
from fractalgen.build import Plan, open_folder, plan_build, run_build
from fractalgen.categories import read_categories, shipped_categories
from fractalshards import open_dataset
from fractalshards.digest import mapping_digest, systems_digest
from fractalshards.errors import FractalError
from fractalshards.manifest import load_manifest
from fractalshards.systems import write_systems
from packing import assert_refused, is_sound

SLOW = ["--n", "240", "--points", "1000000"]
FINISH = {"build": [*SMALL, "--out"], "repair": ["repair"]}


def start(arguments: list[str], out: Path, workers: int = 1) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fractalgen", *arguments, "--out", out, "--workers", str(workers)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def finish(plan: Plan) -> tuple[str, ...]:
    with ThreadPoolExecutor(1) as pool:
        return run_build(plan, pool)


def sidecars(out: Path) -> list[Path]:
    return list(out.glob("*-*.json"))


def test_built_folder_describes_itself(built):
    shards = [*(f"train-00000{i}" for i in range(5)), "val-000000"]
    files = [f"{shard}.{end}" for shard in shards for end in ("json", "tar")]
    assert names(built) == ["_info.json", "recipe.json", "systems.npz", *files]
    stored = json.loads((built / "recipe.json").read_text())
    manifest = load_manifest(built)
    assert stored == {"recipe": manifest.recipe, "recipe_digest": manifest.recipe_digest}
    assert manifest.recipe == replace(RECIPE, systems_digest=manifest.recipe["systems_digest"]).to_json()
    assert (manifest.samples("train"), manifest.samples("val"), manifest.classes) == (110, 13, 20)
    assert manifest.software["numba"]
    for split, first, count in (("train", 0, 110), ("val", 110, 13)):
        samples = [*map(open_dataset(built, split).read, range(count))]
        assert [sample.key for sample in samples] == [f"{first + i:09d}" for i in range(count)]
        counts = np.bincount([sample.label for sample in samples], minlength=20)
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("command", FINISH)
def test_finished_dataset_is_left_alone(built, tmp_path, command, threads):
    out = shutil.copytree(built, tmp_path / "again")
    before = times(out)
    result = succeed(*FINISH[command], out)
    assert "nothing to render" in result.stderr or result.stdout.startswith("sound: ")
    assert times(out) == before


def test_build_renders_what_is_missing_or_damaged(built, tmp_path, threads):
    out = shutil.copytree(built, tmp_path / "gaps")
    (out / "train-000001.json").unlink()
    (out / "train-000003.tar").unlink()
    (out / "systems.npz").unlink()
    os.truncate(out / "val-000000.tar", 700)
    kept = (out / "train-000000.tar").stat().st_mtime_ns
    result = succeed(*SMALL, "--out", out)
    assert "to render: 63 images in 3 shards (3 done)" in result.stderr
    assert files(out) == files(built)
    assert (out / "train-000000.tar").stat().st_mtime_ns == kept


def test_build_refuses_a_folder_of_something_else(built, tmp_path, threads):
    out = shutil.copytree(built, tmp_path / "other")
    before = files(out)
    other = run(*SMALL, "--out", out, "--seed", "1", "--set", "blur_probability=0")
    assert_refused(other, 1, "seed 0 there, 1 here", "blur_probability 0.5 there, 0.0 here")
    assert files(out) == before
    write_systems(out / "systems.npz", [np.zeros((2, 2, 3))] * 20)
    (out / "_info.json").unlink()
    assert_refused(run(*SMALL, "--out", out), 1, "systems.npz")
    assert not (out / "_info.json").exists()
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("precious")
    assert_refused(run(*SMALL, "--out", thesis), 1, "thesis.tex")
    assert names(thesis) == ["thesis.tex"]


def test_new_folder_is_claimed_by_one_of_two_recipes(tmp_path):
    out = tmp_path / "contested"
    slow, fast = (make_recipe("single", 40, classes=20, size=32, points=100, seed=seed) for seed in (0, 1))
    plan = plan_build(open_folder(out, slow))
    finish(plan_build(open_folder(out, fast)))
    before = files(out)
    with pytest.raises(FractalError, match="seed"):
        finish(plan)
    assert files(out) == before


def test_two_builds_in_one_folder_make_one_dataset(built, tmp_path):
    out = tmp_path / "out"
    for process in [start(SMALL, out, workers=2) for _ in range(2)]:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert files(out) == files(built)


def running_in(group: int) -> list[str]:
    listing = subprocess.run(["ps", "-o", "pid=,stat=", "-g", str(group)], text=True, capture_output=True).stdout
    return [line for line in listing.splitlines() if "Z" not in line.split()[1]]


@pytest.mark.slow
def test_killed_build_continues_to_the_same_dataset(tmp_path, threads):
    """SIGKILL to the parent ends the workers, and the next build continues."""
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "killed"
    succeed(*SMALL, *SLOW, "--out", undisturbed)
    process = start([*SMALL, *SLOW], out, workers=2)
    wait_until(lambda: sidecars(out), process)
    process.kill()
    process.communicate()
    wait_until(lambda: not running_in(process.pid))
    assert not (out / "_info.json").exists()
    assert len(sidecars(out)) < 11
    (out / f".tmp~{os.uname().nodename}~{process.pid}~00000000~train-000004.tar").write_bytes(b"half")
    assert "done)" in succeed(*SMALL, *SLOW, "--out", out).stderr
    assert files(out) == files(undisturbed)


def test_killed_workers_shards_are_rendered_again(tmp_path, threads):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    options = [*SMALL, "--points", "300000"]
    succeed(*options, "--out", undisturbed)
    process = start(options, out)
    wait_until(lambda: sidecars(out), process)
    [worker] = workers_of(process.pid)
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate()
    assert (process.returncode, "SIGKILL" in errors) == (0, True), errors
    assert files(out) == files(undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_a_build_after_the_running_shards(tmp_path, number, code):
    out = tmp_path / "stopped"
    process = start([*SMALL, *SLOW], out)
    wait_until(lambda: sidecars(out), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("error: ")
    assert str(out) in last
    assert not (out / "_info.json").exists()
    assert not [name for name in names(out) if name.startswith(".")]
    assert len(list(out.glob("*.tar"))) == len(sidecars(out))


def test_full_disk_leaves_only_finished_shards(built, small_disk):
    out = small_disk / "out"
    plan = plan_build(open_folder(out, RECIPE))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(350_000))
    with pytest.raises(OSError, match="No space left on device") as caught:
        finish(plan)
    assert caught.value.filename.startswith(str(out))
    assert not (out / "_info.json").exists()
    assert not [name for name in names(out) if name.startswith(".")]
    filler.unlink()
    finish(plan_build(open_folder(out, RECIPE)))
    assert files(out) == files(built)


@pytest.mark.parametrize("command", FINISH)
def test_finished_dataset_may_be_read_only(built, small_disk, command, threads):
    out = small_disk / "out"
    subprocess.run(["cp", "-r", built, out], check=True)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    succeed(*FINISH[command], out)
    assert_refused(run(*SMALL, "--n", "111", "--out", out), 1)


def test_categories_that_stay_black_are_named(tmp_path, threads):
    diverges = [[2, 0, 0, 2, 1, 1, 0.5], [1.5, 0, 0, 1.5, 0, 0, 0.5]]
    categories = (*shipped_categories()[:2], np.array(diverges), np.array([[0.5, 0, 0, 0.5, 1, 1, 1]]))
    for index, category in enumerate(categories):
        np.savetxt(tmp_path / f"{index:05d}.csv", category, delimiter=",", fmt="%.18e")
    options = ["build", "--kind", "fractaldb", "--n", "16", "--size", "32", "--points", "500"]
    result = succeed(*options, "--from-csv", tmp_path, "--out", tmp_path / "out")
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert "00002, 00003" in warning
    assert "00001" not in warning


def test_given_categories_are_stored(tmp_path, threads):
    """Categories come from a file or a folder of CSV files; a later build uses those stored in the dataset folder."""
    folder, stored = tmp_path / "csv" / "csv0", tmp_path / "categories.npz"
    folder.mkdir(parents=True)
    for index in range(3):
        np.savetxt(folder / f"{index:05d}.csv", shipped_categories()[index + 5], delimiter=",", fmt="%.18e")
    write_systems(stored, shipped_categories()[5:9])
    options = ["build", "--kind", "fractaldb", "--n", 16, "--size", 32, "--points", 500]
    for name, given in (("a", ["--from-csv", tmp_path / "csv"]), ("b", ["--categories", stored, "--classes", 3])):
        succeed(*options, "--out", tmp_path / name, *given)
        assert load_manifest(tmp_path / name).classes == 3
        assert all(map(np.array_equal, read_categories(tmp_path / name / "systems.npz"), shipped_categories()[5:8]))
    assert "nothing to render" in run(*options, "--out", tmp_path / "a", "--classes", 3).stderr
    write_systems(stored, shipped_categories()[:3])
    options += ["--categories", stored]
    assert_refused(run(*options, "--out", tmp_path / "a"), 1, "systems_digest")
    assert_refused(run(*options, "--classes", 4, "--out", tmp_path / "c"), 2, "3 categories")


def recipe_with(**changes: object) -> Callable[[Path], object]:
    return lambda path: edit(path, recipe=json.loads(path.read_text())["recipe"] | changes)


def unfinished(path: Path) -> None:
    for end in (".tar", ".json"):
        path.with_suffix(end).unlink()
    path.with_name("_info.json").unlink()


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "copy")


DAMAGES: list[tuple[str, Callable[[Path], object]]] = [
    ("train-000001.tar", lambda path: overwrite(path, 2000, b"?!")),
    ("train-000002.tar", lambda path: overwrite(path, 3, b"?")),
    ("val-000000.tar", lambda path: os.truncate(path, 5000)),
    ("train-000003.tar", Path.unlink),
    ("train-000004.json", Path.unlink),
    ("train-000000.tar", unfinished),
    ("train-000001.json", lambda path: shutil.copy(path.with_name("train-000000.json"), path)),
    ("train-000000.json", lambda path: edit(path, content_digest="0" * 32)),
    ("_info.json", Path.unlink),
    ("_info.json", lambda path: os.truncate(path, 99)),
    ("_info.json", recipe_with(seed=5)),
    ("recipe.json", Path.unlink),
    ("recipe.json", recipe_with(seed=5)),
    ("systems.npz", Path.unlink),
    ("systems.npz", lambda path: write_systems(path, [np.zeros((2, 2, 3))] * 20)),
    ("systems.npz", lambda path: os.truncate(path, 1000)),
]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_repair_renders_only_the_damaged_shard(built, copy, name, damage):
    damage(copy / name)
    kept = {path.name: path.stat().st_mtime_ns for path in copy.glob("*.tar") if path.stem != Path(name).stem}
    result = succeed("repair", copy)
    rendered = [Path(name).with_suffix(".tar").name] if "-" in name else []
    assert re.findall("rendered again: (.*)", result.stdout) == rendered
    assert result.stdout.splitlines()[-1].startswith("sound: ")
    assert files(copy) == files(built)
    assert {name: (copy / name).stat().st_mtime_ns for name in kept} == kept
    assert is_sound(copy)


def test_repair_refuses_shards_that_differ_from_the_manifest(built, copy, threads):
    splits = json.loads((copy / "_info.json").read_text())["splits"]
    splits["val"]["content_digests"] = ["0" * 32]
    edit(copy / "_info.json", splits=splits)
    for _ in range(2):  # the manifest stays as it is
        assert_refused(run("repair", copy), 1, "val-000000.tar")
    (copy / "_info.json").unlink()
    succeed("repair", copy)
    assert files(copy) == files(built)


def test_repair_names_what_it_cannot_repair(copy, tmp_path, threads):
    part = shutil.copytree(copy, tmp_path / "part")
    splits = json.loads((part / "_info.json").read_text())["splits"]
    edit(part / "_info.json", splits={"train": splits["train"]})  # as 'fractalshards pull --shards' leaves it
    extra = shutil.copytree(copy, tmp_path / "extra")
    shutil.copy(copy / "val-000000.tar", extra / "extra.tar")
    recipe_with(version=1)(copy / "_info.json")
    os.truncate(copy / "recipe.json", 10)
    nouns = {part: "part", extra: "extra.tar", copy: "recipe version 1", tmp_path / "nowhere": "recipe.json"}
    for folder, noun in nouns.items():
        result = run("repair", folder)
        assert_refused(result, 1, noun)
        assert "sound:" not in result.stdout


def test_systems_that_the_kind_cannot_render_are_refused(copy, threads):
    """A folder from elsewhere may be consistent and still hold unusable systems."""
    systems = [np.zeros((3, 7))] * 20
    write_systems(copy / "systems.npz", systems)
    recipe = RECIPE.to_json() | {"systems_digest": systems_digest(systems)}
    edit(copy / "recipe.json", recipe=recipe, recipe_digest=mapping_digest(recipe))
    for command in (["repair", copy], [*SMALL, "--out", copy]):
        assert_refused(run(*command), 1, str(copy / "systems.npz"), "20 systems")
