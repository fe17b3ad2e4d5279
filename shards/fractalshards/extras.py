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
        raise _missing(
            what, str(error.name).partition(".")[0], f"pip install '.[{extra}]' in a clone of the project"
        ) from error


@contextmanager
def needs_package(what: str, package: str, command: str) -> Iterator[None]:
    """Around what imports a package, perhaps deep inside another one that says so in its own words.

    Args:
        what: the thing that needs it, to begin a sentence with.
        command: installs it.

    Raises:
        FractalError: if it is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise _missing(what, package, command) from error


def _missing(what: str, package: str, command: str) -> FractalError:
    return FractalError(f"{what} needs {package}, which is not installed; run {command}")
