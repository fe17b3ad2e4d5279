"""FractalDB's categories: read from published CSV files, kept in a file of arrays; the published 1000 come along."""

import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fractalgen.limits import MAX_MAPS
from fractalshards.errors import FractalError
from fractalshards.systems import read_systems, write_systems

Category = npt.NDArray[np.float64]  # (maps, 7): a, b, c, d, e, f, p

_COLUMNS = "a, b, c, d, e, f, p"
_RENEW = "fetch it again or write it with 'fractalgen search'"
_CSV_NAME = re.compile(r"\d{5}\.csv")


@cache
def shipped_categories() -> tuple[Category, ...]:
    """The 1000 published categories, bit for bit: what ``search_categories(1000)`` finds."""
    with as_file(files("fractalgen") / "data" / "fractaldb_categories.npz") as path:
        return read_categories(path)


def write_categories(path: Path, categories: Sequence[Category]) -> None:
    """Write categories as one file of arrays, atomically.

    Raises:
        OSError: as the file system does.
    """
    write_systems(path, categories)


def read_categories(path: Path) -> tuple[Category, ...]:
    """Read what ``write_categories`` wrote, in order of class.

    Raises:
        FractalError: if the file is damaged or holds anything but categories.
        OSError: if it cannot be read.
    """
    try:
        categories = read_systems(path)
    except FractalError as error:
        raise FractalError(f"{path}: no file of categories, or damaged; {_RENEW}") from error
    if not categories:
        raise FractalError(f"{path}: holds no categories; {_RENEW}")
    for index, category in enumerate(categories):
        fault = _fault(category)
        if fault:
            raise FractalError(f"{path}: category {index:05d}: {fault}; {_RENEW}")
    return categories


def read_csv_folder(folder: Path) -> tuple[Category, ...]:
    """Read a folder of CSV files as FractalDB publishes them: 00000.csv, 00001.csv, ... in it or its subfolders.

    Raises:
        FractalError: if there are none, a number is missing or there twice, or a file is no category.
        OSError: if the folder or a file cannot be read.
    """
    paths = sorted(_csv_files(folder), key=lambda path: (path.name, path))
    if not paths:
        raise FractalError(f"{folder}: no files 00000.csv, 00001.csv, ...; give the folder of FractalDB's CSV files")
    for index, path in enumerate(paths):
        if index and path.name == paths[index - 1].name:
            raise FractalError(f"{folder}: {paths[index - 1]} and {path} are the same category; keep one of them")
        if path.name != f"{index:05d}.csv":
            raise FractalError(f"{folder}: {index:05d}.csv is missing; categories are numbered from 00000 without gaps")
    return tuple(read_csv(path) for path in paths)


def read_csv(path: Path) -> Category:
    """Read a category as FractalDB publishes it: a line per map, with a, b, c, d, e, f and the probability p.

    Raises:
        FractalError: if a line is anything else.
        OSError: if the file cannot be read.
    """
    rows: list[list[float]] = []
    with path.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if len(rows) == MAX_MAPS:
                raise FractalError(f"{path}: line {number}: a category has at most {MAX_MAPS} maps; leave out the rest")
            rows.append(_parse_row(line, f"{path}: line {number}"))
    if not rows:
        raise FractalError(f"{path}: empty; write a line '{_COLUMNS}' for each map")
    category = np.array(rows)
    fault = _fault(category)
    if fault:
        raise FractalError(f"{path}: line 1 to {number}: {fault}; write the share of each map in the last column")
    return category


def _csv_files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from (inner for inner in path.iterdir() if _CSV_NAME.fullmatch(inner.name))
        elif _CSV_NAME.fullmatch(path.name):
            yield path


def _parse_row(line: str, where: str) -> list[float]:
    """The seven numbers of a line."""
    fields = line.split(",")
    if len(fields) != 7:
        raise FractalError(f"{where}: {len(fields)} columns; write the seven numbers {_COLUMNS}, commas between them")
    row = [_parse_number(field.strip(), where) for field in fields]
    if row[-1] < 0:
        raise FractalError(f"{where}: the probability p is {row[-1]:g}; write one that is not negative")
    return row


def _parse_number(field: str, where: str) -> float:
    try:
        number = float(field)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise FractalError(f"{where}: {field[:30]!r} is no finite number; write the seven numbers {_COLUMNS}")
    return number


def _fault(category: Category) -> str:
    """What makes an array no category, in words; empty if it is one."""
    if category.ndim != 2 or category.shape[1] != 7 or not 1 <= len(category) <= MAX_MAPS:
        return f"an array of shape {category.shape}, not 1 to {MAX_MAPS} rows of {_COLUMNS}"
    if not np.isfinite(category).all():
        return "not every number is finite"
    if (category[:, 6] < 0).any():
        return "a probability p is negative"
    if not category[:, 6].any():
        return "all probabilities p are 0"
    return ""
