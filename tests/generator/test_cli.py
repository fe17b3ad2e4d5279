"""The commands beside ``build``: what they write is right, what they refuse is refused in one line."""

import json
import time
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from fractalgen import build as forecast
from fractalgen.categories import read_categories, shipped_categories, write_categories
from fractalgen.cli import main
from fractalgen.kinds import KINDS
from fractalshards import console
from fractalshards.console import PATH
from fractalshards.manifest import load_manifest


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """A category as a published CSV file."""
    path = tmp_path / "00007.csv"
    np.savetxt(path, shipped_categories()[7], delimiter=",")
    return path


@pytest.mark.parametrize("name", ["00007_06_point_gray.png", "00007_09_patch_gray_seed1_flip0.png"])
def test_render_draws_the_published_images(reference: Path, tmp_path: Path, name: str) -> None:
    case = next(x for x in json.loads((reference / "fractaldb_images/index.json").read_text()) if x["file"] == name)
    out = tmp_path / "new" / "image.png"
    options = ["--params", reference / "fractaldb_csv/00007.csv", "--weight-row", case["weight_row"], "--out", out]
    options += ["--draw", case["draw"].replace("_", "-"), "--mask-seed", case.get("python_random_seed", 0)]
    result = run("render", *options)
    assert result.exit_code == 0, result.output
    expected = pixels(reference / "fractaldb_images" / name)
    assert np.array_equal(pixels(out), expected)
    assert run("render", *options, "--flip", 2).exit_code == 0
    assert np.array_equal(pixels(out), expected[:, ::-1])


@pytest.mark.parametrize(
    ("content", "options", "code", "words"),
    [
        (None, ["--weight-row", 25], 2, "--weight-row"),
        (None, ["--draw", "patch"], 2, "--draw"),
        (None, ["--size", 8], 2, "--size"),
        (None, ["--points", 0], 2, "--points"),
        (None, ["--flip", 4], 2, "--flip"),
        (None, ["--out", "image.jpg"], 2, "ends in .png"),
        (None, ["--params", "nowhere.csv"], 1, "nowhere.csv: No such file"),
        ("1,2,3\n", [], 1, "line 1: 3 columns"),
        ("0.5,0,0,0.5,0,0,1\n0.5,0,0,nan,0,0,1\n", [], 1, "line 2: 'nan' is no finite number"),
        ("a,b,c,d,e,f,p\n", [], 1, "line 1: 'a' is no finite number"),
        ("", [], 1, "empty"),
    ],
    ids=str,
)
def test_render_refuses_in_one_line(
    csv: Path, tmp_path: Path, content: str | None, options: list[object], code: int, words: str
) -> None:
    if content is not None:
        csv.write_text(content)
    result = run("render", "--params", csv, "--out", tmp_path / "image.png", *options)
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "image.png").exists()


def test_render_of_one_map_one_point_and_the_largest_image(tmp_path: Path) -> None:
    one = tmp_path / "one.csv"
    one.write_text("0.5,0.1,-0.1,0.5,0.2,0.3,1\n")
    for options in (["--points", 1], ["--size", 4096], ["--size", 16], ["--draw", "patch-color"]):
        result = run("render", "--params", one, "--out", tmp_path / "image.png", "--points", 2000, *options)
        assert result.exit_code == 0, result.output
        assert pixels(tmp_path / "image.png").any()


def test_search_writes_categories_that_build_takes(tmp_path: Path) -> None:
    found = tmp_path / "new" / "found.npz"
    result = run("search", "--classes", 2, "--seed", 5, "--fill-rate", 0.1, "--workers", 1, "--out", found)
    assert result.exit_code == 0, result.output
    assert f"{found}: 2 categories" in result.stdout
    assert "candidates" in result.stderr
    categories = read_categories(found)
    assert len(categories) == 2
    out = tmp_path / "built"
    options = ["--kind", "fractaldb", "--n", 16, "--size", 32, "--points", 500, "--workers", 1, "--out", out]
    assert run("build", *options, "--categories", found).exit_code == 0
    assert load_manifest(out).classes == 2
    with np.load(out / "systems.npz") as stored:
        assert all(np.array_equal(stored[f"{i:05d}"], category) for i, category in enumerate(categories))
    again = run("build", *options, "--classes", 2)
    assert again.exit_code == 0, again.output  # the folder stores its systems
    assert "nothing to render" in again.stderr
    other = run("build", *options, "--classes", 2, "--categories", write(tmp_path, shipped_categories()[:2]))
    assert other.exit_code == 1
    assert "systems_digest" in other.stderr


def write(folder: Path, categories: object) -> Path:
    path = folder / "categories.npz"
    write_categories(path, categories)
    return path


def test_csv_folders_are_read_by_search_and_build(tmp_path: Path, csv: Path) -> None:
    folder = tmp_path / "csv" / "csv0"
    folder.mkdir(parents=True)
    for index in range(3):
        np.savetxt(folder / f"{index:05d}.csv", shipped_categories()[index], delimiter=",", fmt="%.18e")
    found, out = tmp_path / "found.npz", tmp_path / "built"
    assert run("search", "--from-csv", tmp_path / "csv", "--out", found).exit_code == 0
    read = read_categories(found)
    assert all(np.array_equal(a, b) for a, b in zip(read, shipped_categories()[:3], strict=True))
    options = ["--kind", "fractaldb", "--n", 12, "--size", 32, "--points", 500, "--workers", 1, "--out", out]
    result = run("build", *options, "--from-csv", tmp_path / "csv")
    assert result.exit_code == 0, result.output
    assert load_manifest(out).classes == 3
    (folder / "00001.csv").unlink()
    result = run("build", *options, "--from-csv", tmp_path / "csv")
    assert result.exit_code == 1
    assert "00001.csv is missing" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--kind", "single", "--categories", "x.npz"], 2, "--kind is 'single'"),
        (["--kind", "fractaldb", "--categories", "x.npz", "--from-csv", "y"], 2, "give one of them"),
        (["--kind", "fractaldb", "--categories", "nowhere.npz"], 1, "nowhere.npz: No such file"),
        (["--kind", "fractaldb", "--from-csv", "."], 1, "no files 00000.csv"),
        (["--kind", "fractaldb", "--classes", "1001"], 2, "fractalgen search --classes 1001"),
        (["--kind", "fractaldb", "--shard-size", "3"], 2, "has 4 to 100,000 samples"),
        (["--kind", "fractaldb", "--n", "2000000", "--set", "draw=point-gray"], 2, "kind fractaldb"),
    ],
    ids=str,
)
def test_build_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("build", "--n", 5000, "--workers", 1, *options)
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_too_many_classes_for_the_categories_given(tmp_path: Path) -> None:
    path = write(tmp_path, shipped_categories()[:3])
    result = run("build", "--kind", "fractaldb", "--n", 100, "--classes", 4, "--categories", path)
    assert result.exit_code == 2
    assert "holds 3 categories" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--classes", 0], 2, "classes is 0"),
        (["--fill-rate", 0.5], 2, "fill rate is 0.5"),
        (["--seed", -1], 2, "seed is -1"),
        (["--workers", "none"], 2, "--workers is 'none'"),
        (["--from-csv", "nowhere"], 1, "nowhere: No such file"),
        (["--from-csv", __file__], 1, "not a file"),
    ],
    ids=str,
)
def test_search_refuses_in_one_line(tmp_path: Path, options: list[object], code: int, words: str) -> None:
    result = run("search", "--out", tmp_path / "found.npz", *options)
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "found.npz").exists()


def test_empty_paths_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [parameter for command in main.commands.values() for parameter in command.params]
    assert all(parameter.type is PATH for parameter in parameters if isinstance(parameter.type, click.Path))
    monkeypatch.chdir(tmp_path)
    for arguments in (["build", "--kind", "single", "--n", 1000, "--out", ""], ["repair", ""]):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert "is empty; give a path" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_compiles_for_long_says_so_unless_quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compiling(*arguments: object) -> list[int]:
        time.sleep(0.3)
        return [1000]

    monkeypatch.setattr(console, "_NOTICE_SECONDS", 0.1)
    monkeypatch.setattr(forecast, "_stored_bytes", compiling)
    build = ["build", "--kind", "single", "--n", 2, "--classes", 1, "--size", 32, "--workers", 1]
    loud = run(*build, "--out", tmp_path / "loud")
    assert "getting ready; the first run after an install compiles ...\n" in loud.stderr
    assert run(*build, "--quiet", "--out", tmp_path / "quiet").stderr == ""


@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_preview_draws_a_row_per_class(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "sheet.png"
    result = run("preview", "--kind", kind, "--classes", 3, "--per-class", 2, "--out", out)
    assert result.exit_code == 0, result.output
    sheet = pixels(out)
    width, height = 44 + 2 * 100, 28 + 3 * 100 + 4
    assert sheet.shape == (height, width * (3 if kind == "all" else 1), 3)
    for row in range(3):
        tile = sheet[32 + 100 * row : 128 + 100 * row, 44:140]
        assert tile.std() > 5, f"row {row} shows nothing"


def test_preview_shows_what_set_changes(tmp_path: Path) -> None:
    sheets = []
    for value in ("true", "false"):
        out = tmp_path / f"{value}.png"
        assert run("preview", "--kind", "single", "--set", f"background={value}", "--out", out).exit_code == 0
        sheets.append(pixels(out))
    assert (sheets[0] == 0).all(-1).mean() < 0.05 < 0.2 < (sheets[1] == 0).all(-1).mean()


def test_preview_takes_size_points_and_seed(tmp_path: Path) -> None:
    plain = ["preview", "--kind", "fractaldb", "--classes", 2, "--per-class", 2, "--tile", 32]
    sheets = {}
    for name, options in {
        "plain": [],
        "size": ["--size", 64],
        "points": ["--points", 50],
        "seed": ["--seed", 1],
    }.items():
        out = tmp_path / f"{name}.png"
        assert run(*plain, *options, "--out", out).exit_code == 0
        sheets[name] = pixels(out)
    assert {sheet.shape for sheet in sheets.values()} == {(28 + 2 * 36 + 4, 44 + 2 * 36, 3)}
    assert len({sheet.tobytes() for sheet in sheets.values()}) == 4


def test_preview_refuses_in_one_line(tmp_path: Path) -> None:
    for options, words in (
        (["--kind", "fractl"], "unknown kind"),
        (["--kind", "all", "--set", "maps=2,3"], "--set changes one kind"),
        (["--kind", "single", "--set", "mops=2,3"], "did you mean 'maps'"),
        (["--kind", "single", "--classes", 0], "--classes"),
        (["--kind", "single", "--size", 8], "--size"),
        (["--kind", "single", "--out", tmp_path / "x.tiff"], "ends in .png or .jpg"),
    ):
        result = run("preview", "--out", tmp_path / "x.png", *options)
        assert result.exit_code == 2, (options, result.output)
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_kinds_lists_every_parameter_with_default_and_range() -> None:
    result = run("kinds")
    assert result.exit_code == 0
    for name in KINDS:
        assert f"\n{name}  " in f"\n{result.stdout}"
    for text in ("patch-gray", "weight_rows", "0,24", "objects", "1,5", "object_size", "0.15,0.6", "jitter", "0.8,1.1"):
        assert text in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    for row in (["jitter", "0.8,1.1", "0.0", "to", "10.0"], ["objects", "1,5", "1", "to", "255"]):
        assert row in [found[:5] for found in rows]


@pytest.mark.parametrize(("given", "missing"), [(("--kind", "single"), "--n"), (("--n", 20), "--kind")])
def test_a_build_names_the_option_that_is_missing(given, missing):
    result = run("build", *given)
    assert result.exit_code == 2
    assert result.stderr == f"error: {missing} is missing; give --kind and --n, or --recipe\n"
