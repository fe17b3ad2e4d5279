"""``fractalgen render``, ``search``, ``preview`` and ``kinds``: their output is right, and they refuse in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from fractalgen import cli
from fractalgen.categories import read_categories, shipped_categories
from fractalgen.cli import main
from fractalgen.kinds import KINDS


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
    ("content", "options", "code", "noun"),
    [
        (None, ["--weight-row", 25], 2, "--weight-row"),
        (None, ["--draw", "patch"], 2, "--draw"),
        (None, ["--size", 8], 2, "--size"),
        (None, ["--points", 0], 2, "--points"),
        (None, ["--flip", 4], 2, "--flip"),
        (None, ["--out", "image.jpg"], 2, "image.jpg"),
        (None, ["--params", "nowhere.csv"], 1, "nowhere.csv"),
        ("0.5,0,0,0.5,0,0,1\n1,2,3\n", [], 1, "line 2"),
    ],
    ids=str,
)
def test_render_refuses_in_one_line(
    csv: Path, tmp_path: Path, content: str | None, options: list[object], code: int, noun: str
) -> None:
    if content is not None:
        csv.write_text(content)
    result = run("render", "--params", csv, "--out", tmp_path / "image.png", *options)
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert noun in line
    assert not (tmp_path / "image.png").exists()


def test_search_writes_categories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new" / "found.npz"
    searches = []

    def search(*arguments: object) -> object:
        searches.append(arguments[:3])
        return cli_search(*arguments)

    cli_search = cli.search_categories
    monkeypatch.setattr(cli, "search_categories", search)
    options = ["search", "--classes", 2, "--seed", 5, "--fill-rate", 0.1, "--workers", 1, "--out", out]
    loud, quiet = run(*options), run(*options, "--quiet")
    assert loud.exit_code == quiet.exit_code == 0, loud.output
    assert f"{out}: 2 categories" in loud.stdout
    assert "searching: 2 / 2" in loud.stderr
    assert quiet.stderr == ""
    assert len(read_categories(out)) == 2
    assert searches == [(2, 5, 0.1)] * 2


@pytest.mark.parametrize(
    ("options", "code", "noun"),
    [
        (["--classes", 0], 2, "classes is 0"),
        (["--fill-rate", 0.5], 2, "fill rate is 0.5"),
        (["--workers", "none"], 2, "--workers"),
        (["--from-csv", "nowhere"], 1, "nowhere"),
        (["--from-csv", __file__], 1, "test_cli.py"),
    ],
    ids=str,
)
def test_search_refuses_in_one_line(tmp_path: Path, options: list[object], code: int, noun: str) -> None:
    result = run("search", "--out", tmp_path / "found.npz", *options)
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert noun in line
    assert not (tmp_path / "found.npz").exists()


def test_build_says_that_it_may_compile_first(tmp_path: Path, threads: None) -> None:
    build = ["build", "--kind", "single", "--n", 2, "--classes", 1, "--size", 32, "--points", 100]
    assert "compiles" in run(*build, "--out", tmp_path / "loud").stderr
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
        assert sheet[32 + 100 * row : 128 + 100 * row, 44:140].std() > 5, f"row {row} shows nothing"


def test_preview_takes_the_options_of_a_recipe(tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    plain = ["preview", "--kind", "fractaldb", "--classes", 2, "--per-class", 2, "--tile", 32, "--out", out]
    sheets = []
    for options in ([], ["--size", 64], ["--points", 50], ["--seed", 1], ["--set", "draw=point-gray"]):
        assert run(*plain, *options).exit_code == 0
        sheets.append(pixels(out))
    assert {sheet.shape for sheet in sheets} == {(28 + 2 * 36 + 4, 44 + 2 * 36, 3)}
    assert len({sheet.tobytes() for sheet in sheets}) == 5


@pytest.mark.parametrize(
    ("options", "noun"),
    [
        (["--kind", "fractl"], "'fractl'"),
        (["--kind", "all", "--set", "maps=2,3"], "--set"),
        (["--kind", "single", "--set", "mops=2,3"], "'maps'"),
        (["--kind", "single", "--classes", 0], "--classes"),
        (["--kind", "single", "--size", 8], "size is 8"),
        (["--kind", "single", "--out", "x.tiff"], "x.tiff"),
    ],
    ids=str,
)
def test_preview_refuses_in_one_line(tmp_path: Path, options: list[object], noun: str) -> None:
    result = run("preview", "--out", tmp_path / "x.png", *options)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert noun in line
    assert list(tmp_path.iterdir()) == []


def test_kinds_lists_every_parameter_with_default_and_range() -> None:
    result = run("kinds")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    for row in (["jitter", "0.8,1.1", "0.0", "to", "10.0"], ["objects", "1,5", "1", "to", "255"]):
        assert row in [found[:5] for found in rows]
    listed = json.loads(run("kinds", "--json").stdout)
    assert [kind["name"] for kind in listed] == list(KINDS)
    for kind in listed:
        for parameter in kind["parameters"]:
            assert parameter["name"] in [row[0] for row in rows if row]
