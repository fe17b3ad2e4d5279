"""``systems.npz``: the systems of a dataset, one float64 array per class, named by five digits."""

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fractalshards.errors import FractalError
from fractalshards.manifest import MAX_CLASSES
from fractalshards.storage import atomic_file, read_bounded

MAP_SHAPES = {(2, 3): 1, (7,): 1, (12,): 2}  # of a map, and the first version of the format that has it
MAX_SYSTEMS_BYTES = 64 << 20  # stored and inflated
_COMPRESSION = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others inflate more than is asked for

Systems = Sequence[npt.NDArray[np.float64]]


def write_systems(path: Path, systems: Systems) -> None:
    """Write all systems, atomically."""
    arrays: dict[str, Any] = {f"{index:05d}": system for index, system in enumerate(systems)}
    with atomic_file(path) as file:
        np.savez(file, **arrays)


def read_systems(path: Path) -> tuple[npt.NDArray[np.float64], ...]:
    """Read all systems in order of class, without unpickling; raises FractalError if the file is damaged."""
    return parse_systems(read_bounded(path, MAX_SYSTEMS_BYTES), str(path))


def parse_systems(data: bytes, where: str) -> tuple[npt.NDArray[np.float64], ...]:
    """Parse the systems in a file that came from ``where``; see ``read_systems``."""
    file = io.BytesIO(data)
    try:
        with zipfile.ZipFile(file) as archive:
            _check_bounds(archive.infolist())
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return tuple(_system(arrays[f"{index:05d}"]) for index in range(len(arrays.files)))
    except Exception as error:  # numpy and zipfile do not document what they raise for damaged files
        raise FractalError(f"{where}: damaged ({error}); restore it or build into an empty folder") from error


def _check_bounds(members: Sequence[zipfile.ZipInfo]) -> None:
    """Raise, before anything is inflated, if it would take more memory than systems do."""
    if len(members) > MAX_CLASSES:
        raise ValueError(f"{len(members):,} arrays")
    if any(member.compress_type not in _COMPRESSION for member in members):
        raise ValueError("neither stored nor deflated")
    if (total := sum(member.file_size for member in members)) > MAX_SYSTEMS_BYTES:
        raise ValueError(f"{total:,} bytes when inflated, not a file of systems")


def _system(array: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    if not isinstance(array, np.ndarray):  # numpy returns the bytes of members that are not arrays
        raise ValueError("a member that is not an array")
    if array.dtype != np.float64 or array.shape[1:] not in MAP_SHAPES:
        raise ValueError(f"an array of {array.dtype} {array.shape}, not a system")
    return array
