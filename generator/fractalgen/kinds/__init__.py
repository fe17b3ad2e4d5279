"""The registry of kinds: a new kind is one new file beside this one, and one name in ``KINDS``."""

from fractalgen.kinds import fractaldb, multi, single
from fractalgen.kinds.kind import Kind
from fractalshards.errors import UsageError
from fractalshards.settings import nearest

__all__ = ["KINDS", "Kind", "find_kind"]

KINDS: dict[str, Kind] = {module.KIND.name: module.KIND for module in (fractaldb, single, multi)}


def find_kind(name: str) -> Kind:
    """The kind of that name.

    Raises:
        UsageError: if there is none; the nearest name is suggested.
    """
    if name not in KINDS:
        raise UsageError(f"unknown kind {name!r}{nearest(name, KINDS)}")
    return KINDS[name]
