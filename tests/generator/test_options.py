"""Every option of ``fractalgen`` that other tests do not need: that it does what its help says."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from fractalgen import cli
from fractalgen.build import restore
from fractalgen.categories import Found, shipped_categories
from fractalgen.cli import main
from recorded_pools import RecordedPools


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def without_workers(small: list[str]) -> list[str]:
    return small[: small.index("--workers")]


def test_a_build_has_the_recipe_that_was_asked_for(tmp_path: Path, pools: RecordedPools) -> None:
    text = "--kind single --n 9 --val 4 --classes 3 --size 16 --points 70 --seed 5 --shard-size 6"
    result = run("build", *text.split(), "--set", "blur_probability=0.25", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    recipe, _ = restore(tmp_path / "out")
    found = (recipe.kind, recipe.n, recipe.val, recipe.classes, recipe.size, recipe.points, recipe.seed)
    assert found == ("single", 9, 4, 3, 16, 70, 5)
    assert (recipe.shard_size, recipe.to_json()["params"]["blur_probability"]) == (6, 0.25)


def test_a_build_tells_how_many_work(small: list[str], tmp_path: Path, pools: RecordedPools) -> None:
    """They are as many as cores, unless fewer are asked for or there are fewer shards."""
    few = [*without_workers(small), "--val", "0", "--shard-size", "30"]  # four shards
    for options, size, words in (
        (["--workers", 3], 3, "with 3 workers\n"),
        (["--workers", 1], 1, "with 1 worker\n"),
        ([], 5, "with 4 workers\n"),
    ):
        result = run(*few, *options, "--out", tmp_path / f"{size}")
        assert result.exit_code == 0, result.output
        assert pools.sizes[-1] == size
        assert words in result.stderr


def test_repair_has_the_workers_asked_for_and_can_be_quiet(built: Path, tmp_path: Path, pools: RecordedPools) -> None:
    copy = shutil.copytree(built, tmp_path / "copy")
    loud = run("repair", copy, "--workers", 3)
    assert loud.exit_code == 0, loud.output
    assert "verifying" in loud.stderr
    quiet = run("repair", copy, "--quiet")
    assert (quiet.stdout, quiet.stderr) == (loud.stdout, "")
    assert pools.sizes == [3, 5]


def test_search_looks_for_what_was_asked_for_and_can_be_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pools: RecordedPools
) -> None:
    searches = []

    def search(*asked: object) -> list[Found]:
        *others, advance = asked
        searches.append(others)
        advance(2)
        return [Found(shipped_categories()[index], 5, 0.2) for index in range(2)]

    monkeypatch.setattr(cli, "search_categories", search)
    arguments = ["search", "--classes", 2, "--seed", 7, "--fill-rate", 0.1, "--workers", 3]
    loud = run(*arguments, "--out", tmp_path / "found.npz")
    assert loud.exit_code == 0, loud.output
    assert "searching: 2 / 2" in loud.stderr
    quiet = run(*arguments, "--quiet", "--out", tmp_path / "found.npz")
    result, advice = loud.stdout.splitlines()
    assert advice.startswith("next: fractalgen build ")
    assert (quiet.stdout, quiet.stderr) == (f"{result}\n", "")
    assert searches == [[2, 7, 0.1, 3]] * 2


def test_render_has_the_size_and_the_points_asked_for(tmp_path: Path) -> None:
    np.savetxt(tmp_path / "one.csv", shipped_categories()[7], delimiter=",")

    def hits(*options: object) -> np.ndarray:
        out = tmp_path / "image.png"
        result = run("render", "--params", tmp_path / "one.csv", "--draw", "point-gray", "--out", out, *options)
        assert result.exit_code == 0, result.output
        with Image.open(out) as image:
            return np.asarray(image.convert("L")) > 0

    assert hits("--size", 40, "--points", 3).shape == (40, 40)
    assert 1 <= hits("--size", 40, "--points", 3).sum() <= 3 < hits("--size", 40, "--points", 300).sum()
