"""``fractalgen render``, ``search``, ``preview`` and ``kinds``: their output; what all commands refuse, in one line."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from building import run, succeed
from fractalgen.categories import read_categories, search_categories, shipped_categories
from fractalgen.kinds import KINDS
from packing import assert_refused


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("name", ["00007_06_point_gray.png", "00007_09_patch_gray_seed1_flip0.png"])
def test_render_draws_the_published_images(reference, tmp_path, name):
    case = next(x for x in json.loads((reference / "fractaldb_images/index.json").read_text()) if x["file"] == name)
    out = tmp_path / "new" / "image.png"
    options = ["--params", reference / "fractaldb_csv/00007.csv", "--weight-row", case["weight_row"], "--out", out]
    options += ["--draw", case["draw"].replace("_", "-"), "--mask-seed", case.get("python_random_seed", 0)]
    expected = pixels(reference / "fractaldb_images" / name)
    for flip, flipped in ((0, expected), (2, expected[:, ::-1])):
        succeed("render", *options, "--flip", flip)
        assert np.array_equal(pixels(out), flipped)


def test_search_writes_categories(tmp_path):
    out = tmp_path / "new" / "found.npz"
    result = succeed("search", "--classes", 2, "--seed", 5, "--fill-rate", 0.1, "--workers", 1, "--out", out)
    assert f"{out}: 2 categories" in result.stdout
    assert "searching: 2 / 2" in result.stderr
    found = search_categories(2, seed=5, fill_rate=0.1)
    assert all(one.fill_rate >= 0.1 for one in found)
    assert all(np.array_equal(one.category, read) for one, read in zip(found, read_categories(out), strict=True))
    assert not any(np.array_equal(found[0].category, category) for category in shipped_categories())


BUILD = "build --kind single --n 110 --classes 20 --size 32 --shard-size 25"
VISUALATOM = "build --kind visualatom --n 12 --classes 6 --set processes=2 --set instances=30"
RENDER = "render --kind visualatom --category 1 --instance 1"


@pytest.mark.parametrize(
    ("command", "code", "noun"),
    [
        (f"{BUILD} --recipe recipe.json", 2, "--recipe"),
        (f"{BUILD} --set mops=2,3", 2, "'maps'"),
        (f"{BUILD} --set blur_probability=1.5", 2, "blur_probability"),
        (f"{BUILD} --set maps=4,2", 2, "maps"),
        (f"{BUILD} --kind fractaldb --set draw=patch", 2, "draw"),
        (f"{BUILD} --n 0", 2, "n is 0"),
        (f"{BUILD} --n 19", 2, "20 classes"),
        (f"{BUILD} --n 1000000000 --val 1", 2, "n + val"),
        (f"{BUILD} --n 1000000 --shard-size 1", 2, "shards"),
        (f"{BUILD} --size 4097", 2, "size is 4097"),
        (f"{BUILD} --categories x.npz", 2, "--kind is 'single'"),
        (f"{BUILD} --kind fractaldb --categories x.npz --from-csv y", 2, "--from-csv"),
        (f"{BUILD} --kind fractaldb --categories nowhere.npz", 1, "nowhere.npz"),
        (f"{BUILD} --kind fractaldb --from-csv .", 1, "00000.csv"),
        (f"{BUILD} --kind fractaldb --n 5000 --classes 1001", 2, "fractalgen search --classes 1001"),
        (f"{BUILD} --out /proc/nowhere", 1, "/proc/nowhere"),
        (f"{BUILD} --out {__file__}", 1, "test_cli.py"),
        (f"{BUILD} --size 2048 --n 99999999 --shard-size 99999", 1, "disk"),
        (f"{BUILD} --executor dask", 2, "--scheduler"),
        (f"{BUILD} --scheduler tcp://localhost:1", 2, "--executor dask"),
        (f"{BUILD} --executor dask --scheduler tcp://localhost:1 --workers 2", 2, "--workers"),
        (f"{VISUALATOM} --classes 7", 2, "processes"),
        (f"{VISUALATOM} --n 181", 2, "instances"),
        (f"{VISUALATOM} --points 5", 2, "points"),
        (f"{VISUALATOM} --set vertices=2", 2, "vertices"),
        ("recipe --n 8", 2, "--kind"),
        ("recipe --kind fractaldb --n 5000 --classes 1001", 2, "categories"),
        ("recipe --kind onepfrac --classes 5 --set sigma=6", 2, "sigma"),
        ("recipe --kind onepfrac --classes 5 --set threshold=0.9", 2, "threshold"),
        ("recipe --kind onepfrac --classes 5 --set maps=9", 2, "maps"),
        ("render --params csv --out image.jpg", 2, "image.jpg"),
        ("render --params nowhere.csv", 1, "nowhere.csv"),
        ("render", 2, "--params"),
        ("render --kind visualatom --category 1", 2, "--kind visualatom needs --category"),
        (f"{RENDER} --instance 1000", 2, "instance"),
        (f"{RENDER} --category 60 --classes 60 --set instances=2", 2, "category"),
        (f"{RENDER} --classes 61", 2, "classes"),
        (f"{RENDER} --params x.csv", 2, "--params"),
        (f"{RENDER} --draw point-gray", 2, "--draw"),
        (f"{RENDER} --set stream=own", 2, "stream"),
        (f"{RENDER} --kind single", 2, "'single'"),
        *((f"search --classes {number}", 2, f"classes is {number}") for number in (0, 100_001)),
        *((f"search --seed={number}", 2, "seed") for number in (-1, 2**32)),
        *((f"search --fill-rate={number}", 2, "fill rate") for number in (0.0, 0.39, "nan")),
        ("preview --kind fractl", 2, "'fractl'"),
        ("preview --kind all --set maps=2,3", 2, "--set"),
        ("preview --kind single --size 8", 2, "size is 8"),
        ("preview --kind single --out x.tiff", 2, "x.tiff"),
    ],
)
def test_refusal_is_one_line(tmp_path, monkeypatch, command, code, noun):
    monkeypatch.chdir(tmp_path)
    name, *options = shlex.split(command)
    assert_refused(run(name, "--out", "out.png", *options), code, noun)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [*KINDS, "all"])
def test_preview_draws_a_row_per_class(tmp_path, kind):
    out = tmp_path / "sheet.png"
    succeed("preview", "--kind", kind, "--classes", 3, "--per-class", 2, "--out", out)
    sheet = pixels(out)
    width, height = 44 + 2 * 100, 28 + 3 * 100 + 4
    assert sheet.shape == (height, width * (len(KINDS) if kind == "all" else 1), 3)
    for row in range(3):
        assert sheet[32 + 100 * row : 128 + 100 * row, 44:140].std() > 5, f"row {row} shows nothing"


def test_preview_takes_the_options_of_a_recipe(tmp_path):
    out = tmp_path / "sheet.png"
    plain = ["preview", "--kind", "fractaldb", "--classes", 2, "--per-class", 2, "--tile", 32, "--out", out]
    sheets = []
    for options in ([], ["--size", 64], ["--points", 50], ["--seed", 1], ["--set", "draw=point-gray"]):
        succeed(*plain, *options)
        sheets.append(pixels(out))
    assert {sheet.shape for sheet in sheets} == {(28 + 2 * 36 + 4, 44 + 2 * 36, 3)}
    assert len({sheet.tobytes() for sheet in sheets}) == 5


def test_recipe_is_written_or_printed(tmp_path):
    options = ["recipe", "--kind", "rcdb", "--n", 2, "--classes", 2, "--set", "processes=2", "--set", "stream=own"]
    for size, warned in ((64, True), (512, False), (600, False)):  # curves do not shrink with the image
        printed = succeed(*options, "--size", size)
        succeed(*options, "--size", size, "--out", tmp_path / "new.json")
        assert printed.stdout_bytes == (tmp_path / "new.json").read_bytes()
        assert ("warning:" in printed.stderr) == warned


def test_kinds_lists_every_parameter_with_default_and_range():
    rows = [line.split() for line in succeed("kinds").stdout.splitlines()]
    for row in (["jitter", "0.8,1.1", "0.0", "to", "10.0"], ["objects", "1,5", "1", "to", "255"]):
        assert row in [found[:5] for found in rows]
    listed = {kind["name"]: kind["parameters"] for kind in json.loads(succeed("kinds", "--json").stdout)}
    assert list(listed) == list(KINDS)
    assert {one["name"] for parameters in listed.values() for one in parameters} <= {row[0] for row in rows if row}
    ranges = {one["name"]: (one["default"], one["range"]) for one in listed["multi"]}
    assert (ranges["objects"], ranges["flips"]) == (([1, 5], "1 to 255"), (True, "true, false"))
