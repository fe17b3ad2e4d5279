"""Compiled kernels: random bits, orbits, rasters, colours, compression. Pure functions of arrays."""

import os
from contextlib import suppress
from typing import Any

from numba.core import caching, config

from fractalshards.errors import FractalError
from fractalshards.storage import private_cache

SIZES = range(16, 4097)  # side of an image in pixels
MAX_POINTS = 10**8  # per chaos game
MAX_MAPS = 255  # per system: map numbers are bytes, and one value means no map


def _find_cache() -> bool:
    """Return whether numba has a folder for compiled kernels: beside their source, else that of all caches.

    Without a home, numba would choose a folder ``~`` in the current folder, and run what it finds there.
    """
    if os.environ.get("NUMBA_CACHE_DIR") or os.access(os.path.dirname(__file__), os.W_OK):
        return True
    with suppress(FractalError):  # a folder that others can write to
        if folder := private_cache():
            os.environ["NUMBA_CACHE_DIR"] = str(folder / "numba")
            return True
    return False


CACHE = _find_cache()
"""Whether compiled kernels are kept for other processes: the argument ``cache`` of ``njit``."""

# numba reads settings from the current folder, and those of a dataset's author could name a folder of compiled code
config._config_fname = os.devnull
config.reload_config()


_caching: Any = caching  # has no types


class _CacheFile(_caching.IndexDataCacheFile):  # type: ignore[misc]
    """Compiles again what a crash has damaged; numba itself would fail at every start (numba issue 10434)."""

    def _load_index(self) -> Any:
        try:
            return super()._load_index()
        except Exception:  # pickles raise anything
            return {}

    def _load_data(self, name: str) -> Any:
        try:
            return super()._load_data(name)
        except Exception as error:
            raise OSError(f"{name}: damaged") from error  # to numba, it is missing


_caching.IndexDataCacheFile = _CacheFile
