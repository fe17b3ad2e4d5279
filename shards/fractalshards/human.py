"""Sizes, durations, counts and untrusted text, formatted for people."""

import re
from collections.abc import Sequence

from fractalshards.errors import UsageError

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgt])?(i)?b?", re.IGNORECASE)
_LONGEST_LINE = 2000


def human_bytes(count: float) -> str:
    """Format a size in decimal units with three digits, e.g. ``72.4 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def parse_bytes(text: str, option: str) -> int:
    """Parse ``20GB``, ``500 MB`` or ``1 GiB`` as a number of bytes; raises UsageError for anything else."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{option} {text}: expected a size such as 20GB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** ("kmgt".index(match[2].lower()) + 1 if match[2] else 0))


def human_seconds(seconds: float) -> str:
    """Format a duration as ``H:MM:SS``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def human_count(count: int, noun: str) -> str:
    """Format a number and what it counts, e.g. ``1 shard`` or ``1,000 shards``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def human_list(names: Sequence[str], most: int = 20) -> str:
    """Join the first ``most`` names with commas, and say how many more there are."""
    more = [f"and {len(names) - most:,} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def escape_bytes(name: str) -> str:
    """Return the name of a file with escapes for bytes that are not UTF-8, for texts that do not take these."""
    return name.encode(errors="backslashreplace").decode()


def one_line(text: str) -> str:
    """Return text on a single line of bounded length without control characters: names may come from hostile files."""
    shown = escape_bytes(text if len(text) <= _LONGEST_LINE else f"{text[:_LONGEST_LINE]} ...")
    return "".join(letter if letter.isprintable() else " " for letter in " ".join(shown.split()))
