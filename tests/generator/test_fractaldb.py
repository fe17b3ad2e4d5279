"""FractalDB and 1p-frac: the published pixels, categories and composition; a slow renderer; unusual input."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fractalgen import draw_systems, make_recipe, render_sample
from fractalgen.categories import read_categories, read_csv, read_csv_folder, search_categories, shipped_categories
from fractalgen.kernels import fractaldb as kernel
from fractalgen.kernels.fractaldb import DRAWS, Draw, masks, orbit, random_numbers, render, weight_rows
from fractalgen.kernels.random import Stream
from fractalgen.kinds import fractaldb
from fractalgen.kinds.anderson import sample_system
from fractalgen.kinds.fractaldb import FractaldbParams
from fractalgen.kinds.kind import Unit
from fractalgen.plan import locate
from fractalshards.digest import systems_digest
from fractalshards.errors import FractalError, UsageError

KEY = Stream.of("kataoka").key()
ONES = np.ones(6)
LEAF = np.array(
    [
        [0.5, 0.25, -0.25, 0.5, 0.0, 0.0, 0.3],
        [0.5, -0.375, 0.125, 0.625, 1.0, 0.5, 0.4],
        [-0.25, 0.5, 0.75, 0.125, -0.5, 1.0, 0.3],
    ]
)
DIVERGING = LEAF * [2.5, 2.5, 2.5, 2.5, 1.0, 1.0, 1.0]

TAME = st.floats(-1.2, 1.2)
WILD = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-300, 1e300, -1e308, math.inf, -math.inf, math.nan])


def slow_points(category: np.ndarray, numbers: np.ndarray) -> Iterator[tuple[float, float]]:
    """Run the chaos game in plain Python, step by step."""
    maps = category.tolist()
    x = y = 0.0
    yield x, y
    for number in numbers[:-1].tolist():
        total = 0.0
        for a, b, c, d, e, f, p in maps:
            total += p
            if number <= total:
                x, y = x * a + y * b + e, x * c + y * d + f
                break
        yield x, y


@np.errstate(all="ignore")
def slow_render(
    category: np.ndarray, weights: np.ndarray, size: int, points: int, draw: Draw, patch_masks: np.ndarray
) -> np.ndarray:
    """Render as published, point by point."""
    scaled = category.copy()
    scaled[:, :6] *= weights
    kept = np.array(list(slow_points(scaled, np.random.RandomState(100).random_sample(points))))
    for axis in (0, 1):
        lost = np.isnan(kept[:, axis])
        if lost.any():
            first = int(np.argmax(lost))
            lost[max(0, first - 100) : first] = True
        kept = kept[~lost]
    image = np.zeros((size, size), np.uint8)
    if len(kept):
        shifted = kept - np.minimum(kept.min(0), 0)
        places = shifted / (shifted.max(0) - shifted.min(0)) * (size - 12) + 6
        columns, rows = np.where(np.isfinite(places), places, 0).astype(int).T.tolist()
        for i, (row, column) in enumerate(zip(rows, columns, strict=True)):
            color = 1 + i % 128 if draw.endswith("color") else 1
            if kernel.is_patch(draw):
                bits = np.array([int(bit) for bit in f"{patch_masks[i]:09b}"]).reshape(3, 3)
                image[row + 1 : row + 4, column + 1 : column + 4] = bits * color
            else:
                image[row, column] = color
    return image[::-1]


def test_render_equals_the_published_images(reference):
    cases = json.loads((reference / "fractaldb_images" / "index.json").read_text())
    assert {case["draw"].replace("_", "-") for case in cases} == set(DRAWS)
    assert np.array_equal(weight_rows(), np.loadtxt(reference / "fractaldb_weights_0.4.csv", delimiter=","))
    for case in cases:
        category = np.loadtxt(reference / "fractaldb_csv" / f"{case['category']}.csv", delimiter=",", ndmin=2)
        draw = case["draw"].replace("_", "-")
        seed = case.get("python_random_seed")
        drawn = None if seed is None else kernel.published_masks(seed, case["iterations"])
        weights = weight_rows()[case["weight_row"]]
        indices = kernel.flip(render(category, weights, case["size"], case["iterations"], draw, drawn), case["flip"])
        with Image.open(reference / "fractaldb_images" / case["file"]) as theirs:
            assert np.array_equal(kernel.palette(draw)[indices], np.asarray(theirs.convert("RGB"))), case["file"]


def test_render_pixels_are_pinned():
    """A change of any pixel would change every dataset."""
    drawn = masks(KEY, 5000)
    assert drawn[:6].tolist() == masks(KEY, 6).tolist() == [468, 423, 91, 16, 309, 66]  # whatever their number
    images = [render(LEAF, row, 64, 5000, draw, drawn) for draw in DRAWS for row in weight_rows()[[2, 7]]]
    images += [render(DIVERGING, ONES, 48, 5000, draw, drawn) for draw in DRAWS]
    assert all(image.any() for image in images)
    digests = (
        "a1624a00d44b7953 76217e26207fde37 c7b2a3aaa14a6d92 92c81a61a454aad3 c6fdc5e80d813c4f ef175cf39113262b "
        "29bbe5a65c4b3a6a b78d0f7a1025c151 33ff8273f5da7826 65c2129c7d7911cb 4028331232ff201d 939f3904de8280da"
    )
    assert [xxhash.xxh3_64_hexdigest(image.tobytes()) for image in images] == digests.split()


@settings(max_examples=200)
@given(st.data())
def test_render_equals_the_slow_renderer(data):
    maps = data.draw(st.integers(1, 4))
    values = data.draw(st.sampled_from([TAME, st.one_of(TAME, TAME, WILD)]))
    category = np.array(data.draw(st.lists(st.lists(values, min_size=7, max_size=7), min_size=maps, max_size=maps)))
    if data.draw(st.booleans()):
        category[:, 6] = 1 / maps
    weights = weight_rows()[data.draw(st.integers(0, 24))]
    size, points = data.draw(st.integers(16, 40)), data.draw(st.one_of(st.integers(1, 300), st.integers(2000, 3000)))
    draw = data.draw(st.sampled_from(DRAWS))
    drawn = masks(KEY, points)
    expected = slow_render(category, weights, size, points, draw, drawn)
    assert np.array_equal(render(category, weights, size, points, draw, drawn), expected)


@pytest.mark.parametrize("points", [1, 2, 7, 8, 9, 2047, 2048, 2055, 2056, 2057, 2063, 2064, 4999])
@pytest.mark.parametrize("turn", [0.5, 1.0], ids=["contracts", "only turns"])
def test_orbit_of_any_length_equals_the_slow_one(points, turn):
    """Orbits under a pure rotation never meet, nor do those of maps that are not always chosen."""
    cosine, sine = turn * math.cos(1), turn * math.sin(1)
    category = np.array([[cosine, -sine, sine, cosine, 1, 0, 0.5], [cosine, sine, -sine, cosine, 0, 1, 0.4]])
    expected = np.array(list(slow_points(category, random_numbers(points))))
    assert np.array_equal(np.stack(orbit(category, random_numbers(points)), 1), expected)


def test_render_in_chunks_gives_the_same_pixels(monkeypatch):
    drawn = masks(KEY, 5000)
    whole = [render(LEAF, ONES, 40, 5000, draw, drawn) for draw in DRAWS]
    monkeypatch.setattr(kernel, "_CHUNK", 256)
    assert np.array_equal(whole, [render(LEAF, ONES, 40, 5000, draw, drawn) for draw in DRAWS])


@pytest.mark.parametrize(
    "arguments",
    [
        (LEAF, ONES, 4097, 10, "point-gray"),
        (LEAF, ONES, 32, 10**8 + 1, "point-gray"),
        (LEAF, ONES, 32, 11, "patch-color", masks(KEY, 10)),
        (LEAF, ONES, 32, 10, "line-gray"),
        (np.zeros((0, 7)), ONES, 32, 10, "point-gray"),
        (np.zeros((256, 7)), ONES, 32, 10, "point-gray"),
    ],
    ids=lambda arguments: repr(arguments[2:5]),
)
def test_render_refuses_bad_arguments(arguments):
    with pytest.raises(UsageError):
        render(*arguments)


def test_kind_pixels_are_pinned():
    """Changing any pixel requires a new recipe version."""
    digests = []
    for number, name in enumerate(DRAWS):
        unit = Unit(7, "train", 3, number)
        rendered = fractaldb.render(FractaldbParams(draw=name), 64, 5000, unit, shipped_categories())
        assert [label for _, label in rendered] == [3] * 4
        digests.append(xxhash.xxh3_64_hexdigest(b"".join(image.rgb().tobytes() for image, _ in rendered)))
    assert digests == ["ee8b28242a501bd2", "fa3cc686905f2f66", "d48008034278d3f1", "adef9d36794a95ff"]


def test_kind_composes_a_thousand_and_a_million_as_published():
    """OFDB renders every category once, unflipped; a million images have 25 weight rows, 10 draws and 4 flips."""

    def taken(n: int, classes: int) -> Counter[tuple[int, int, int]]:
        recipe = make_recipe("fractaldb", n, classes=classes)
        assert (recipe.size, recipe.points, recipe.params.draw) == (362, 200_000, "patch-gray")
        places = [locate(recipe, index) for index in range(n)]
        return Counter((place.unit.label, place.unit.number, place.part) for place in places)

    assert make_recipe("fractaldb", 1000).classes == make_recipe("fractaldb", 1_000_000).classes == 1000
    assert taken(1000, 1000) == Counter(product(range(1000), [0], [0]))
    assert taken(10_000, 10) == Counter(product(range(10), range(250), range(4)))


@pytest.mark.parametrize(("name", "n"), [("patch-gray", 240), ("patch-gray", 1000), ("point-gray", 240)])
def test_kind_shares_no_render_between_splits(name, n):
    recipe = make_recipe("fractaldb", n, val=40, classes=10, size=32, points=500, overrides={"draw": name})
    systems = draw_systems(recipe)
    images = [(label, image.tobytes()) for image, label in (render_sample(recipe, systems, i) for i in range(n + 40))]
    assert not set(images[:n]) & set(images[n:])


def test_kind_of_points_has_a_hundred_images_per_class():
    points = {"draw": "point-color"}
    assert make_recipe("fractaldb", 960, val=40, classes=10, overrides=points).val == 40
    for n, val in ((1001, 0), (950, 60)):
        with pytest.raises(UsageError, match="100"):
            make_recipe("fractaldb", n, val=val, classes=10, overrides=points)
    with pytest.raises(UsageError, match="12"):
        make_recipe("fractaldb", 130, classes=10, overrides={**points, "weight_rows": "2,4"})


ROW = "0.5,0,0,0.5,0.25,-1e-3,1"


def write_csv(path: Path, category: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    np.savetxt(path, category, delimiter=",")  # as the published code does


def test_shipped_categories_are_the_published_ones(reference):
    published = read_csv_folder(reference / "fractaldb_csv")
    assert len(published) == 150
    assert all(np.array_equal(*pair) for pair in zip(published, shipped_categories(), strict=False))


def test_shipped_categories_are_pinned():
    assert systems_digest(shipped_categories()) == "201aa5bc24bccf68a212dbe432eb7f53"


@pytest.mark.parametrize("folders", [[""], ["csv0", "csv1", "csv2"]])
def test_csv_folder_may_have_subfolders(tmp_path, folders):
    for index in range(7):
        write_csv(tmp_path / folders[index % len(folders)] / f"{index:05d}.csv", shipped_categories()[index])
    (tmp_path / "weights_0.4.csv").write_text("1,1\n")
    back = read_csv_folder(tmp_path)
    assert len(back) == 7
    assert all(np.array_equal(*pair) for pair in zip(back, shipped_categories(), strict=False))


def test_csv_folder_with_gaps_or_duplicates_is_refused(tmp_path):
    with pytest.raises(FractalError, match="missing"):
        read_csv_folder(tmp_path / "missing")
    for name in ("00000.csv", "csv1/00000.csv", "csv1/00002.csv"):
        write_csv(tmp_path / name, shipped_categories()[0])
    for folder, wrong in ((tmp_path, "csv1/00000.csv"), (tmp_path / "csv1", "csv1/00002.csv")):
        with pytest.raises(FractalError, match=wrong):
            read_csv_folder(folder)


def lines(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(text.encode("latin-1"))


def arrays(**named: np.ndarray) -> Callable[[Path], object]:
    return lambda path: np.savez(path, **named)


@pytest.mark.parametrize(
    ("read", "write"),
    [
        *(
            (read_csv, lines(text))
            for text in ("\n\n", f"{ROW},1\n", f"{ROW}\n1,2,3\n", f"{ROW}\n{ROW.replace('-1e-3', 'abc')}\n",
                f"{ROW}\n\n{ROW.replace('0.25', 'nan')}\n", ROW[:-1] + "-0.5", ROW[:-1] + "0", (ROW + "\n") * 256,
                "\x80\xff", "1" * (1 << 21))
        ),
        (read_categories, arrays()),
        (read_categories, arrays(**{"00001": np.ones((2, 7))})),
        (read_categories, arrays(**{"00000": np.ones((2, 7)), "00001": np.ones((2, 2, 3))})),
        (read_categories, arrays(**{"00000": np.array([[None] * 7])})),
    ],
)  # fmt: skip
def test_other_files_of_categories_are_refused(tmp_path, read, write):
    path = tmp_path / "00000.npz"
    write(path)
    with pytest.raises(FractalError, match=rf"\A{path}: .*\Z"):  # one line
        read(path)


def test_search_finds_the_published_categories(reference):
    calls: list[tuple[int, int]] = []
    found = search_categories(12, workers=2, on_progress=lambda *call: calls.append(call))
    assert all(np.array_equal(one.category, shipped) for one, shipped in zip(found, shipped_categories(), strict=False))
    assert calls[-1] == (12, 12)
    published = json.loads((reference / "fractaldb_search.json").read_text())[:4]
    expected = [(one["candidate"], one["fill_rate"]) for one in published]
    assert [(one.candidate, one.fill_rate) for one in found[:4]] == expected


ONEPFRAC = make_recipe("onepfrac", 40, classes=20)
PERTURBED = draw_systems(ONEPFRAC)


def test_onepfrac_perturbs_one_fractal():
    """Coefficients differ from those of the sampler of ``single`` by their own factors, probabilities not at all."""
    fractal = sample_system(2, np.random.default_rng([0]), (4.8, 5.2))
    assert 3.4 <= sum(np.linalg.svd(affine)[1] @ (1, 2) for affine in fractal[:, :, :2]) <= 3.6
    area = np.abs(np.linalg.det(fractal[:, :, :2]))
    coefficients = np.concatenate([fractal[:, :, :2].reshape(2, 4), fractal[:, :, 2]], axis=1)
    factors = np.stack([system[:, :6] for system in PERTURBED]) / coefficients
    assert np.all((factors > 0.9 - 1e-5) & (factors < 1.1 + 1e-5))
    assert 0.03 < factors.std() < 0.08  # that of U(0.9, 1.1) is 0.058, but some are drawn again
    assert len(np.unique(factors.round(9))) == factors.size
    for system in PERTURBED:
        assert system[:, 6] == pytest.approx(area / area.sum(), abs=1e-5)


def test_onepfrac_pixels_are_pinned():
    """Changing any system or pixel requires a new recipe version."""
    state = xxhash.xxh3_64()
    for index in (0, 7, 39):
        image, label = render_sample(ONEPFRAC, PERTURBED, index)
        state.update(image.tobytes())
        number = locate(ONEPFRAC, index).unit.number
        masks = kernel.masks(Stream.of("onepfrac", 0, "train", label, number).key(), 100_000)
        expected = kernel.render(PERTURBED[label], ONES, 512, 100_000, "patch-gray", masks)
        assert np.array_equal(image, 127 * np.repeat(expected[..., None], 3, axis=2))
    digests = ONEPFRAC.with_systems(PERTURBED).digest(), state.hexdigest()
    assert digests == ("ff8ba46844cb768c0ef5a15ea4a5c2f7", "b99aa8ff4b6ec8b0")
