"""Categories of FractalDB: the published ones, files of both formats, and the search."""

import json
from collections.abc import Callable
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

ROW = "0.5,0,0,0.5,0.25,-1e-3,1"


def write_csv(path: Path, category: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    np.savetxt(path, category, delimiter=",")  # as the published code does


def assert_refused(read: Callable[[Path], object], path: Path) -> None:
    with pytest.raises(FractalError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_shipped_categories_are_the_published_ones(reference: Path) -> None:
    published = read_csv_folder(reference / "fractaldb_csv")
    assert len(published) == 150
    assert all(np.array_equal(*pair) for pair in zip(published, shipped_categories(), strict=False))


def test_shipped_categories_are_pinned() -> None:
    assert systems_digest(shipped_categories()) == "201aa5bc24bccf68a212dbe432eb7f53"


@pytest.mark.parametrize("folders", [[""], ["csv0", "csv1", "csv2"]])
def test_csv_folder_may_have_subfolders(tmp_path: Path, folders: list[str]) -> None:
    for index in range(7):
        write_csv(tmp_path / folders[index % len(folders)] / f"{index:05d}.csv", shipped_categories()[index])
    (tmp_path / "weights_0.4.csv").write_text("1,1\n")
    back = read_csv_folder(tmp_path)
    assert len(back) == 7
    assert all(np.array_equal(*pair) for pair in zip(back, shipped_categories(), strict=False))


def test_csv_folder_with_gaps_or_duplicates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FractalError, match="missing"):
        read_csv_folder(tmp_path / "missing")
    for name in ("00000.csv", "csv1/00000.csv", "csv1/00002.csv"):
        write_csv(tmp_path / name, shipped_categories()[0])
    for folder, wrong in ((tmp_path, "csv1/00000.csv"), (tmp_path / "csv1", "csv1/00002.csv")):
        with pytest.raises(FractalError, match=wrong):
            read_csv_folder(folder)


@pytest.mark.parametrize(
    "text",
    [
        "\n\n",
        f"{ROW},1\n",
        f"{ROW}\n1,2,3\n",
        f"{ROW}\n{ROW.replace('-1e-3', 'abc')}\n",
        f"{ROW}\n\n{ROW.replace('0.25', 'nan')}\n",
        ROW[:-1] + "-0.5",
        ROW[:-1] + "0",
        (ROW + "\n") * 256,
        "\x80\xff",
        "1" * (1 << 21),
    ],
    ids=lambda text: repr(text[:40]),
)
def test_read_csv_refuses_other_lines(tmp_path: Path, text: str) -> None:
    path = tmp_path / "00000.csv"
    path.write_bytes(text.encode("latin-1"))
    assert_refused(read_csv, path)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"00001": np.ones((2, 7))},
        {"00000": np.ones((2, 7)), "00001": np.ones((2, 2, 3))},
        {"00000": np.array([[None] * 7])},
    ],
    ids=str,
)
def test_read_categories_refuses_other_arrays(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "c.npz"
    np.savez(path, **arrays)
    assert_refused(read_categories, path)


def test_search_finds_the_published_categories(reference: Path) -> None:
    calls: list[tuple[int, int]] = []
    found = search_categories(12, workers=2, on_progress=lambda *call: calls.append(call))
    assert all(np.array_equal(one.category, shipped) for one, shipped in zip(found, shipped_categories(), strict=False))
    assert calls[-1] == (12, 12)
    published = json.loads((reference / "fractaldb_search.json").read_text())[:4]
    expected = [(one["candidate"], one["fill_rate"]) for one in published]
    assert [(one.candidate, one.fill_rate) for one in found[:4]] == expected


def test_search_without_end_can_be_stopped() -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_categories(1, fill_rate=0.38, on_progress=stop)


@pytest.mark.parametrize(
    ("options", "noun"),
    [
        ({"classes": 0}, "classes"),
        ({"classes": 100_001}, "classes"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
        ({"fill_rate": 0.0}, "fill rate"),
        ({"fill_rate": 0.39}, "fill rate"),
        ({"fill_rate": float("nan")}, "fill rate"),
    ],
    ids=str,
)
def test_search_refuses_bad_arguments(options: dict[str, float], noun: str) -> None:
    with pytest.raises(UsageError, match=noun):
        search_categories(**{"classes": 1, **options})
