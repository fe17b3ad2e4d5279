"""``fractalgen build --recipe``: a small file rebuilds the very same dataset, or says that it does not."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fractalgen.cli import main
from fractalgen.recipe import RECIPE_VERSION
from fractalshards.cli import main as shards
from fractalshards.digest import mapping_digest


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def export(folder: Path, file: Path) -> Path:
    result = CliRunner().invoke(shards, ["recipe", str(folder), "--out", str(file)])
    assert result.exit_code == 0, result.output
    return file


@pytest.mark.parametrize("kind", ["fractaldb", "multi", "single"])
def test_a_recipe_rebuilds_the_very_same_dataset(tmp_path: Path, kind: str) -> None:
    options = f"build --kind {kind} --n 48 --val 12 --classes 6 --size 48 --points 2000 --seed 9 --shard-size 16"
    assert run(*options.split(), "--workers", 1, "--out", tmp_path / "first").exit_code == 0
    recipe = export(tmp_path / "first", tmp_path / "recipe.json")
    result = run("build", "--recipe", recipe, "--out", tmp_path / "second", "--workers", 1)
    assert result.exit_code == 0, result.output
    same = CliRunner().invoke(shards, ["diff", str(tmp_path / "first"), str(tmp_path / "second")])
    assert same.exit_code == 0, same.output
    files = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()} == files


def test_content_that_differs_from_the_promise_is_an_error(built: Path, tmp_path: Path) -> None:
    recipe = export(built, tmp_path / "recipe.json")
    fields = json.loads(recipe.read_text())
    fields["splits"]["val"]["content_digests"][0] = "0" * 32
    digests = {name: split["content_digests"] for name, split in fields["splits"].items()}
    recipe.write_text(json.dumps(fields | {"content_digest": mapping_digest(digests)}))
    result = run("build", "--recipe", recipe, "--out", tmp_path / "out", "--workers", 1)
    assert result.exit_code == 1
    assert "val-000000.tar differ from what" in result.stderr.splitlines()[-1]


def test_recipes_that_cannot_be_built_are_refused_in_one_line(built: Path, tmp_path: Path) -> None:
    recipe = export(built, tmp_path / "recipe.json")
    fields = json.loads(recipe.read_text())
    older = tmp_path / "older.json"
    fields["recipe"]["version"] = RECIPE_VERSION - 1
    older.write_text(json.dumps(fields | {"recipe_digest": mapping_digest(fields["recipe"])}))
    for options, code, words in (
        (["--recipe", recipe, "--n", "5"], 2, "--n and --recipe: give one of them"),
        (["--recipe", recipe, "--set", "maps=2"], 2, "--set and --recipe"),
        (["--kind", "single"], 2, "--kind and --n, or --recipe"),
        ([], 2, "--kind and --n, or --recipe"),
        (["--recipe", tmp_path / "none.json"], 1, "none.json: No such file"),
        (["--recipe", built / "recipe.json"], 1, "not a portable recipe"),
        (["--recipe", older], 1, f"recipe version {RECIPE_VERSION - 1}, this software renders {RECIPE_VERSION}"),
    ):
        result = run("build", *options, "--out", tmp_path / "out")
        assert result.exit_code == code, result.output
        assert len(result.stderr.splitlines()) == 1
        assert words in result.stderr
        assert not (tmp_path / "out").exists()
