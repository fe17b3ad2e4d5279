"""Packages that not every install has: one line says what needs them, and how to get them."""

from collections.abc import Iterator
from contextlib import contextmanager

from fractalshards.errors import FractalError


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """Around imports of an optional extra of this distribution.

    Args:
        extra: its name in pyproject.toml.
        what: the thing that needs it, to begin a sentence with.

    Raises:
        FractalError: if a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise FractalError(
            f"{what} needs {error.name}, which is not installed; run pip install '.[{extra}]' in a clone of the project"
        ) from error
