"""Categories of FractalDB: the published ones, files of both formats, and the search."""

import json
from pathlib import Path

import numpy as np
import pytest

from fractalgen.categories import (
    read_categories,
    read_csv,
    read_csv_folder,
    search_categories,
    shipped_categories,
)
from fractalshards.digest import systems_digest
from fractalshards.errors import FractalError, UsageError
from fractalshards.systems import write_systems

ROW = "0.5,0,0,0.5,0.25,-1e-3,1"


def write_csv(path: Path, category: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    np.savetxt(path, category, delimiter=",")  # as the published code does


def test_shipped_categories_are_the_published_ones(reference: Path) -> None:
    published = read_csv_folder(reference / "fractaldb_csv")
    assert len(published) == 150
    assert all(np.array_equal(*pair) for pair in zip(published, shipped_categories(), strict=False))


def test_shipped_categories_are_pinned() -> None:
    assert systems_digest(shipped_categories()) == "201aa5bc24bccf68a212dbe432eb7f53"


def test_categories_are_read_as_written(tmp_path: Path) -> None:
    write_systems(tmp_path / "c.npz", shipped_categories()[:20])
    back = read_categories(tmp_path / "c.npz")
    assert len(back) == 20
    assert all(np.array_equal(*pair) for pair in zip(back, shipped_categories(), strict=False))


@pytest.mark.parametrize("folders", [[""], ["csv0"], ["csv0", "csv1", "csv2"]])
def test_csv_folder_or_its_subfolders(tmp_path: Path, folders: list[str]) -> None:
    for index in range(7):
        write_csv(tmp_path / folders[index % len(folders)] / f"{index:05d}.csv", shipped_categories()[index])
    (tmp_path / "weights_0.4.csv").write_text("1,1\n")
    back = read_csv_folder(tmp_path)
    assert len(back) == 7
    assert all(np.array_equal(*pair) for pair in zip(back, shipped_categories(), strict=False))


def test_csv_folder_without_categories_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FractalError, match=r"no files 00000\.csv"):
        read_csv_folder(tmp_path)
    for name in ("00000.csv", "00002.csv"):
        (tmp_path / name).write_text(ROW)
    with pytest.raises(FractalError, match=r"00001\.csv is missing"):
        read_csv_folder(tmp_path)
    write_csv(tmp_path / "csv1" / "00000.csv", shipped_categories()[0])
    with pytest.raises(FractalError, match="same category"):
        read_csv_folder(tmp_path)
    with pytest.raises(FractalError, match="missing"):
        read_csv_folder(tmp_path / "missing")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "shape"),
        ("\n\n", "shape"),
        (f"{ROW},1\n", "line 1"),
        (f"{ROW}\n{ROW.replace('-1e-3', 'abc')}\n", "line 2"),
        (f"{ROW}\n\n{ROW.replace('0.25', 'nan')}\n", "line 3"),
        (ROW[:-1] + "-0.5", "p is negative"),
        (ROW[:-1] + "0", "all probabilities"),
        ((ROW + "\n") * 256, "line 256"),
        ("\x80\xff", "line 1"),
    ],
)
def test_csv_without_a_category_is_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "00000.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(FractalError, match=match) as caught:
        read_csv(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "; " in str(caught.value)  # what to do
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"00001": np.ones((2, 7))},
        {"00000": np.ones((2, 6))},
        {"00000": np.ones((256, 7))},
        {"00000": np.ones((2, 7)), "00001": np.full((2, 7), np.nan)},
        {"00000": -np.ones((2, 7))},
        {"00000": np.zeros((2, 7))},
        {"00000": np.array([[None] * 7])},
    ],
    ids=str,
)
def test_arrays_that_are_no_categories_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "c.npz"
    np.savez(path, **arrays)
    with pytest.raises(FractalError, match="fractalgen search") as caught:
        read_categories(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_search_finds_the_published_categories() -> None:
    calls: list[tuple[int, int]] = []
    found = search_categories(12, workers=2, on_progress=lambda *call: calls.append(call))
    assert [one.candidate for one in found[:3]] == [24, 29, 68]
    assert all(np.array_equal(one.category, shipped) for one, shipped in zip(found, shipped_categories(), strict=False))
    assert calls[-1] == (12, 12)


def test_fill_rates_are_the_published_ones(reference: Path) -> None:
    published = json.loads((reference / "fractaldb_search.json").read_text())[:4]
    found = search_categories(4)
    assert [(one.candidate, one.fill_rate) for one in found] == [(x["candidate"], x["fill_rate"]) for x in published]


def test_search_does_not_depend_on_workers() -> None:
    alone, together = (search_categories(6, seed=7, fill_rate=0.1, workers=workers) for workers in (1, 3))
    assert [(one.candidate, one.fill_rate) for one in alone] == [(one.candidate, one.fill_rate) for one in together]
    assert all(np.array_equal(a.category, b.category) for a, b in zip(alone, together, strict=True))
    assert all(one.fill_rate >= 0.1 for one in alone)
    assert not any(np.array_equal(alone[0].category, category) for category in shipped_categories())


def test_search_without_end_can_be_stopped() -> None:
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_categories(1, fill_rate=0.38, on_progress=stop)
    assert seen == [0] * 5


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"classes": 0}, "classes is 0"),
        ({"classes": 100_001}, "classes is 100001"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"fill_rate": 0.0}, "fill rate is 0"),
        ({"fill_rate": 0.39}, "fill rate is 0.39"),
        ({"fill_rate": float("nan")}, "fill rate is nan"),
    ],
)
def test_search_refuses_bad_arguments(options: dict[str, float], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        search_categories(**{"classes": 1, **options})
