"""Categories of FractalDB: the published ones come along, files of both kinds are read, and errors say what to do."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fractalgen.categories import read_categories, read_csv, read_csv_folder, shipped_categories, write_categories
from fractalshards.digest import systems_digest
from fractalshards.errors import FractalError

ROW = "0.5,0,0,0.5,0.25,-1e-3,1"


def write_csv(path: Path, category: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    np.savetxt(path, category, delimiter=",")  # as the published code does


def test_the_published_categories_come_along(reference: Path) -> None:
    published = read_csv_folder(reference / "fractaldb_csv")
    assert len(published) == 150
    assert all(np.array_equal(*pair) for pair in zip(published, shipped_categories(), strict=False))


def test_the_shipped_categories_look_as_such() -> None:
    categories = shipped_categories()
    assert len(categories) == 1000
    assert {len(category) for category in categories} == set(range(2, 8))
    for category in categories:
        assert category.dtype == np.float64
        assert np.abs(category[:, :6]).max() <= 1
        a, b, c, d, _, _, p = category.T
        np.testing.assert_allclose(p, np.abs(a * d - b * c) / np.abs(a * d - b * c).sum(), rtol=1e-12)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_categories(tmp_path / "c.npz", shipped_categories()[:20])
    back = read_categories(tmp_path / "c.npz")
    assert len(back) == 20
    assert all(np.array_equal(*pair) for pair in zip(back, shipped_categories(), strict=False))


@pytest.mark.parametrize("folders", [[""], ["csv0"], ["csv0", "csv1", "csv2"]])
def test_csv_files_lie_in_a_folder_or_its_subfolders(tmp_path: Path, folders: list[str]) -> None:
    for index in range(7):
        write_csv(tmp_path / folders[index % len(folders)] / f"{index:05d}.csv", shipped_categories()[index])
    (tmp_path / "weights_0.4.csv").write_text("1,1\n")
    back = read_csv_folder(tmp_path)
    assert len(back) == 7
    assert all(np.array_equal(*pair) for pair in zip(back, shipped_categories(), strict=False))


def test_a_category_may_have_one_map_and_lines_of_any_style(tmp_path: Path) -> None:
    path = tmp_path / "one.csv"
    path.write_bytes(b"\xef\xbb\xbf" + ROW.replace(",", " , ").encode() + b"\r\n\r\n")
    assert read_csv(path).tolist() == [[0.5, 0, 0, 0.5, 0.25, -1e-3, 1]]


def test_folders_that_hold_no_categories(tmp_path: Path) -> None:
    with pytest.raises(FractalError, match=r"no files 00000\.csv"):
        read_csv_folder(tmp_path)
    for name in ("00000.csv", "00002.csv"):
        (tmp_path / name).write_text(ROW)
    with pytest.raises(FractalError, match=r"00001\.csv is missing"):
        read_csv_folder(tmp_path)
    write_csv(tmp_path / "csv1" / "00000.csv", shipped_categories()[0])
    with pytest.raises(FractalError, match="same category"):
        read_csv_folder(tmp_path)
    with pytest.raises(OSError, match="missing"):
        read_csv_folder(tmp_path / "missing")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "empty"),
        ("\n\n", "empty"),
        (f"{ROW}\n1,2,3\n", "line 2: 3 columns"),
        (f"{ROW},1\n", "line 1: 8 columns"),
        (f"{ROW}\n{ROW.replace('-1e-3', 'abc')}\n", "line 2: 'abc' is no finite number"),
        (f"{ROW}\n\n{ROW.replace('0.25', 'nan')}\n", "line 3: 'nan' is no finite number"),
        (ROW.replace("0.25", "-inf"), "line 1: '-inf' is no finite number"),
        (ROW.replace("0.25", ""), "line 1: '' is no finite number"),
        (ROW[:-1] + "-0.5", "line 1: the probability p is -0.5"),
        (ROW[:-1] + "0", "all probabilities p are 0"),
        ((ROW + "\n") * 256, "line 256: a category has at most 255 maps"),
        ("\x00\ufffd", "line 1: 1 columns"),
    ],
)
def test_files_that_hold_no_category(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "00000.csv"
    path.write_bytes(text.encode("utf-8", "replace"))
    with pytest.raises(FractalError, match=match) as caught:
        read_csv(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "; " in str(caught.value)  # what to do
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "00000.csv"
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(FractalError, match="line 1"):
        read_csv(path)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"00001": np.ones((2, 7))},
        {"00000": np.ones((2, 6))},
        {"00000": np.ones(7)},
        {"00000": np.ones((0, 7))},
        {"00000": np.ones((256, 7))},
        {"00000": np.ones((2, 7)), "00001": np.full((2, 7), np.nan)},
        {"00000": -np.ones((2, 7))},
        {"00000": np.zeros((2, 7))},
        {"00000": np.array([["a"] * 7])},
        {"00000": np.array([[None] * 7])},
    ],
    ids=str,
)
def test_files_of_arrays_that_are_no_categories(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    path = tmp_path / "c.npz"
    np.savez(path, **arrays)
    with pytest.raises(FractalError, match="fractalgen search") as caught:
        read_categories(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    write_categories(path, shipped_categories()[:3])
    whole = path.read_bytes()
    for data in (b"", b"text", whole[:-100], whole.replace(whole[200:210], b"0123456789")):
        path.write_bytes(data)
        with pytest.raises(FractalError, match="fractalgen search"):
            read_categories(path)
    with pytest.raises(OSError, match="No such file"):
        read_categories(tmp_path / "none.npz")


def test_the_shipped_categories_are_pinned() -> None:
    """All 1000 as a search found them; the reference holds the first 150."""
    assert systems_digest(shipped_categories()) == "201aa5bc24bccf68a212dbe432eb7f53"


def test_a_header_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12, 7)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("00000.npy", header.getvalue())
    with pytest.raises(FractalError, match="damaged") as caught:
        read_categories(path)
    assert "\n" not in str(caught.value)
