"""VisualAtom and RCDB: the published pixels and parameters, Python's random numbers, Pillow's lines, our own stream."""

import json
import random
from itertools import chain
from pathlib import Path

import mpmath
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from building import succeed
from fractalgen import draw_systems, make_recipe, render_sample
from fractalgen.build import open_folder, plan_build
from fractalgen.kernels.exact import MAX_ANGLE, log, sine_and_cosine
from fractalgen.kernels.lines import _draw_polygon
from fractalgen.kernels.mt19937 import Mersenne, fill, seed_state, skip
from fractalgen.kinds.contours import render_instance
from fractalgen.plan import locate
from fractalshards import open_dataset
from fractalshards.errors import FractalError
from fractalshards.manifest import load_manifest
from fractalshards.storage import private_cache
from fractalshards.systems import read_systems

STREAM = ("--classes", 6, "--set", "processes=2", "--set", "instances=30")


@pytest.mark.parametrize("seed", [1, 20, 2**40])
def test_mersenne_draws_what_python_draws(seed):
    theirs, ours = random.Random(seed), Mersenne.of(seed_state(seed))
    for turn in range(1200):
        assert ours.integer(0, 256) == theirs.randint(0, 255)
        assert ours.integer(-512, 513) == theirs.randint(-512, 512)
        assert ours.uniform(-3.0, 7.1) == theirs.uniform(-3.0, 7.1)
        words = np.empty(turn * 7 % 1300, np.uint32)
        expected = [theirs.getrandbits(32) for _ in words]
        if turn % 2:
            ours.at = skip(ours.buffers, ours.at, len(words))
        else:
            ours.at = fill(ours.buffers, ours.at, words)
            assert words.tolist() == expected
        if turn % 10 == 0:
            ours = Mersenne.of(ours.state())


def test_sines_cosines_and_logarithms_are_rounded_correctly():
    rng = np.random.default_rng(0)
    angles = np.concatenate([rng.uniform(0, 130, 800), rng.uniform(0, MAX_ANGLE, 100), [0.0, np.pi / 2, np.pi, 1e-9]])
    sines, cosines = sine_and_cosine(angles)
    with mpmath.workdps(60):
        assert sines.tolist() == [float(mpmath.sin(angle)) for angle in angles]
        assert cosines.tolist() == [float(mpmath.cos(angle)) for angle in angles]
        assert [log(x) for x in (1.0, 0.5, 2.0**-53)] == [float(mpmath.log(x)) for x in (1.0, 0.5, 2.0**-53)]


corners = st.lists(st.tuples(*[st.integers(-40, 60) | st.integers(-10_000, 10_000)] * 2), min_size=2, max_size=9)


@given(corners, st.integers(16, 40))
def test_lines_are_those_of_pillow(corners, size):
    ours, theirs = np.zeros((size, size), np.uint8), Image.new("L", (size, size))
    columns, rows = np.array([*corners, corners[0]], np.int32).T
    _draw_polygon(ours, np.ascontiguousarray(columns), np.ascontiguousarray(rows), np.uint8(9))
    for k in range(len(corners)):
        ImageDraw.Draw(theirs).line((columns[k], rows[k], columns[k + 1], rows[k + 1]), fill=9)
    assert np.array_equal(ours, np.asarray(theirs))


@pytest.mark.parametrize("kind", ["visualatom", "rcdb"])
def test_render_draws_the_published_images(reference, tmp_path, kind):
    indices = [json.loads((reference / kind / name).read_text()) for name in ("index.json", "official.json")]
    assert sum(map(len, indices)) == 15
    for case in chain(*indices):
        case = {"instances": {"visualatom": 2, "rcdb": 3}[kind], **case}
        options = [f"--{name}={case[name]}" for name in ("category", "instance", "classes") if name in case]
        options += [f"--set={name}={case[name]}" for name in ("processes", "instances") if name in case]
        out = tmp_path / case["file"]
        succeed("render", "--kind", kind, *options, "--out", out)
        with Image.open(out) as ours, Image.open(reference / kind / case["file"]) as theirs:
            assert ours.mode == "RGB"
            assert np.array_equal(ours, theirs.convert("RGB")), case["file"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("visualatom", (), "visualatom/published_1k_some_classes.csv"),
        ("rcdb", (), "rcdb/published_1k_10_processes_some_classes.csv"),
        ("rcdb", ("--set", "processes=40"), "rcdb/published_1k_40_processes_some_classes.csv"),
    ],
)
def test_parameters_writes_the_published_ones(reference, tmp_path, kind, settings, name):
    out = tmp_path / "parameters.csv"
    succeed("parameters", "--kind", kind, *settings, "--out", out)
    header, *rows = out.read_text().splitlines()
    expected_header, *expected = (reference / name).read_text().splitlines()
    assert header == expected_header
    assert set(expected) <= set(rows)
    assert [row.partition(",")[0] for row in rows] == [str(label) for label in range(1000)]


def build(out: Path, kind: str, *options: object) -> Path:
    succeed("build", "--kind", kind, "--workers", 1, "--shard-size", 60, "--out", out, *options)
    return out


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("kind", ["visualatom", "rcdb"])
def test_build_holds_every_instance_of_the_stream_once(tmp_path, kind):
    out = build(tmp_path / kind, kind, "--n", 180, "--val", 30, "--seed", 3, *STREAM)
    overrides = {"processes": 2, "instances": 30}
    recipe = make_recipe(kind, 180, val=30, classes=6, seed=3, shard_size=60, overrides=overrides)
    systems = draw_systems(recipe)
    manifest = load_manifest(out)
    assert (manifest.format_version, manifest.recipe["version"], manifest.image_size) == (2, 3, 512)
    assert np.array_equal(systems, read_systems(out / "systems.npz"))
    seen, others = set(), set()
    for split, count in (("train", 180), ("val", 30)):
        for key, image, label in map(open_dataset(out, split).read, range(count)):
            place = locate(recipe, int(key))
            if split == "val":
                others.add(image.tobytes())
                assert np.array_equal(image, render_sample(recipe, systems, int(key))[0])
                continue
            number = 25 * place.unit.number + place.part
            seen.add((label, number))
            if number in (0, 7, 8, 24, 25, 29):  # around the states from which an instance is reached
                assert np.array_equal(image, render_instance(recipe.params, 512, 6, label, number).rgb())
    assert seen == {(label, number) for label in range(6) for number in range(30)}
    assert len(others) == 30


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("loss", ["none", "cache", "damaged cache"])
def test_repair_follows_the_stream_again(tmp_path, loss):
    out = build(tmp_path / "out", "rcdb", "--n", 120, *STREAM)
    before = load_manifest(out)
    (out / "train-000001.tar").unlink()
    (out / "systems.npz").unlink()
    for table in (private_cache() / "tables").glob("*.npy") if loss != "none" else ():
        data = table.read_bytes()
        table.unlink()
        if loss == "damaged cache":
            table.write_bytes(data[:-1])
    assert "train-000001.tar" in succeed("repair", out, "--workers", 1).stdout
    assert load_manifest(out).splits == before.splits


def test_smaller_build_holds_the_first_instances():
    recipe = make_recipe("visualatom", 36, classes=12, overrides={"processes": 4, "instances": 30})
    places = [locate(recipe, index) for index in range(36)]
    assert {25 * place.unit.number + place.part for place in places} == {0, 1, 2}
    larger = make_recipe("visualatom", 36, classes=12, size=600, overrides={"processes": 4, "instances": 30})
    small, large = (render_sample(one, draw_systems(one), 5)[0] for one in (recipe, larger))
    assert np.array_equal(small, large[44:556, 44:556])


def test_own_stream_has_any_number_of_images():
    overrides = {"stream": "own"}
    recipe = make_recipe("rcdb", 9000, val=70, classes=7, size=256, overrides=overrides)
    systems = draw_systems(recipe)
    images = {render_sample(recipe, systems, index)[0].tobytes() for index in (*range(60), *range(9000, 9060))}
    assert len(images) > 110  # some show nothing
    assert {system[0, 11] for system in systems} == {0.0}
    others = draw_systems(make_recipe("rcdb", 7, classes=7, seed=1, overrides=overrides))
    assert not any(np.array_equal(*pair) for pair in zip(systems, others, strict=True))


@pytest.mark.parametrize(
    ("kind", "stream", "recipe_digest", "pixels"),
    [
        ("visualatom", "published", "6a7e19d3b51a2bcf427a6060eb2eeaa8", "467fef867985a88c"),
        ("visualatom", "own", "d236df3730c4ffac28fae40141711f19", "dd9fba9a2e3cb032"),
        ("rcdb", "published", "178fcf7ff496914c655a31f781e506ed", "a41e62a3714092e3"),
        ("rcdb", "own", "318258493b165536183cda73d0f20deb", "5c4902595fbc3ee7"),
    ],
)
def test_pixels_are_pinned(kind, stream, recipe_digest, pixels):
    """Changing any pixel requires a new recipe version."""
    overrides = {"processes": 2, "instances": 30, "stream": stream}
    recipe = make_recipe(kind, 120, val=4, classes=4, size=200, overrides=overrides)
    systems = draw_systems(recipe)
    state = xxhash.xxh3_64()
    for index in (*range(0, 120, 9), *range(120, 124)):
        state.update(render_sample(recipe, systems, index)[0].tobytes())
    assert (recipe.with_systems(systems).digest(), state.hexdigest()) == (recipe_digest, pixels)


@pytest.mark.parametrize("stream", ["published", "own"])
def test_systems_of_another_stream_are_refused(tmp_path, stream):
    """As from a portable recipe that somebody put together: its digests fit, but its systems are others."""
    recipe = make_recipe("rcdb", 12, classes=12, overrides={"processes": 4, "instances": 30, "stream": stream})
    systems = [np.nextafter(system, 1e9) for system in draw_systems(recipe)]
    folder = open_folder(tmp_path / "new", recipe.with_systems(systems), systems)
    with pytest.raises(FractalError, match="stream"):
        plan_build(folder)
