"""``fractalgen render``, ``search``, ``preview`` and ``kinds``: their output, and errors in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from building import run
from fractalgen.categories import read_categories, search_categories, shipped_categories
from fractalgen.kinds import KINDS


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


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
    assert (result := run("render", *options, "--flip", 2)).exit_code == 0, result.output
    assert np.array_equal(pixels(out), expected[:, ::-1])


def test_search_writes_categories(tmp_path: Path) -> None:
    out = tmp_path / "new" / "found.npz"
    options = ["search", "--classes", 2, "--seed", 5, "--fill-rate", 0.1, "--workers", 1, "--out", out]
    result = run(*options)
    assert result.exit_code == 0, result.output
    assert f"{out}: 2 categories" in result.stdout
    assert "searching: 2 / 2" in result.stderr
    found = search_categories(2, seed=5, fill_rate=0.1)
    assert all(one.fill_rate >= 0.1 for one in found)
    assert all(np.array_equal(one.category, read) for one, read in zip(found, read_categories(out), strict=True))
    assert not any(np.array_equal(found[0].category, category) for category in shipped_categories())


@pytest.mark.parametrize(
    ("command", "code", "noun"),
    [
        ("render --params csv --weight-row 25", 2, "--weight-row"),
        ("render --params csv --out image.jpg", 2, "image.jpg"),
        ("render --params nowhere.csv", 1, "nowhere.csv"),
        ("search --classes 0", 2, "classes is 0"),
        ("search --workers none", 2, "--workers"),
        ("preview --kind fractl", 2, "'fractl'"),
        ("preview --kind all --set maps=2,3", 2, "--set"),
        ("preview --kind single --size 8", 2, "size is 8"),
        ("preview --kind single --out x.tiff", 2, "x.tiff"),
    ],
)
def test_command_reports_errors_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, code: int, noun: str
) -> None:
    monkeypatch.chdir(tmp_path)
    name, *options = command.split()
    result = run(name, "--out", "out.png", *options)
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert noun in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_preview_draws_a_row_per_class(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "sheet.png"
    result = run("preview", "--kind", kind, "--classes", 3, "--per-class", 2, "--out", out)
    assert result.exit_code == 0, result.output
    sheet = pixels(out)
    width, height = 44 + 2 * 100, 28 + 3 * 100 + 4
    assert sheet.shape == (height, width * (len(KINDS) if kind == "all" else 1), 3)
    for row in range(3):
        assert sheet[32 + 100 * row : 128 + 100 * row, 44:140].std() > 5, f"row {row} shows nothing"


def test_preview_takes_the_options_of_a_recipe(tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    plain = ["preview", "--kind", "fractaldb", "--classes", 2, "--per-class", 2, "--tile", 32, "--out", out]
    sheets = []
    for options in ([], ["--size", 64], ["--points", 50], ["--seed", 1], ["--set", "draw=point-gray"]):
        assert (result := run(*plain, *options)).exit_code == 0, result.output
        sheets.append(pixels(out))
    assert {sheet.shape for sheet in sheets} == {(28 + 2 * 36 + 4, 44 + 2 * 36, 3)}
    assert len({sheet.tobytes() for sheet in sheets}) == 5


def test_kinds_lists_every_parameter_with_default_and_range() -> None:
    result = run("kinds")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    for row in (["jitter", "0.8,1.1", "0.0", "to", "10.0"], ["objects", "1,5", "1", "to", "255"]):
        assert row in [found[:5] for found in rows]
    listed = json.loads(run("kinds", "--json").stdout)
    assert [kind["name"] for kind in listed] == list(KINDS)
    for kind in listed:
        for parameter in kind["parameters"]:
            assert parameter["name"] in [row[0] for row in rows if row]
