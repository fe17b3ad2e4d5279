"""The filesystems of fsspec behind object stores and web servers, made without its caches."""

import importlib
from collections.abc import Callable, Generator
from typing import Any

from fractalshards.sharing.stores import if_there, translated

_BLOCK = 8 << 20  # of an object store, where every block is a request


def make_filesystem(scheme: str, options: dict[str, Any]) -> Any:
    """A filesystem of its own: instances that are shared keep what they listed.

    Raises:
        ImportError: if its package is not installed.
    """
    make: Callable[..., Any] = importlib.import_module("fsspec").filesystem
    return make(scheme, skip_instance_cache=True, **options)


def find_info(files: Any, path: str) -> Any | None:
    """What a filesystem says of a file now; None if it is not there. Raises StoreError."""

    def ask() -> Any:
        files.invalidate_cache(path)
        return files.info(path)

    return if_there(ask)


def read_blocks(files: Any, path: str, start: int) -> Generator[bytes | memoryview]:
    """Bytes of an object from ``start`` on, in large blocks; raises StoreError."""
    with translated(), files.open(path, "rb", block_size=_BLOCK, cache_type="none") as file:
        file.seek(start)
        while chunk := file.read(_BLOCK):
            yield chunk
