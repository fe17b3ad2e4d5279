"""The registry of kinds. To add a kind, add a module beside this one and name it in ``KINDS``."""

from fractalgen.kinds import contours, fractaldb, multi, onepfrac, single
from fractalgen.kinds.kind import Kind
from fractalshards.errors import UsageError
from fractalshards.settings import nearest

__all__ = ["KINDS", "Kind", "find_kind"]

_KINDS = (fractaldb.KIND, single.KIND, multi.KIND, contours.VISUALATOM, contours.RCDB, onepfrac.KIND)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _KINDS}


def find_kind(name: str) -> Kind:
    """Return the kind of a name; raises UsageError, with the nearest names, if there is none."""
    if name not in KINDS:
        raise UsageError(f"unknown kind {name!r}{nearest(name, KINDS)}")
    return KINDS[name]
