"""``systems.npz``: the systems of a dataset's classes, one float64 array per class named by its five digits."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fractalshards.atomic import atomic_file
from fractalshards.errors import FractalError

_MAX_BYTES = 256 << 20
# the last by a header that lies
_DAMAGE = (ValueError, KeyError, TypeError, EOFError, RuntimeError, MemoryError)

Systems = Sequence[npt.NDArray[np.float64]]


def write_systems(path: Path, systems: Systems) -> None:
    """Write all systems, atomically."""
    arrays: dict[str, Any] = {f"{index:05d}": system for index, system in enumerate(systems)}
    with atomic_file(path) as file:
        np.savez(file, **arrays)


def read_systems(path: Path) -> tuple[npt.NDArray[np.float64], ...]:
    """Read all systems in order of class; nothing is unpickled.

    Raises:
        FractalError: if the file is damaged or not a file of systems.
        OSError: if it cannot be read.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise FractalError(f"{path}: larger than {_MAX_BYTES >> 20} MiB, not a file of systems; fetch it again")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return tuple(np.asarray(arrays[f"{index:05d}"], np.float64) for index in range(len(arrays.files)))
    except (*_DAMAGE, zlib.error, zipfile.BadZipFile) as error:
        raise FractalError(f"{path}: damaged ({error}); restore it or build into an empty folder") from error
