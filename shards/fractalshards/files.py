"""Files that came from outside: only regular ones are opened, for a pipe blocks its reader and a device never ends."""

import stat
from pathlib import Path

from fractalshards.errors import FractalError


def regular_size(path: Path) -> int:
    """Size in bytes of a regular file, or of one that a link leads to.

    Raises:
        FractalError: if it is anything else.
        OSError: if it is not there.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FractalError(f"{path}: not a regular file; do not use this dataset")
    return status.st_size


def read_bounded(path: Path, most: int) -> bytes:
    """Read a regular file of at most ``most`` bytes.

    Raises:
        FractalError: if it is larger, or not a regular file.
        OSError: if it cannot be read.
    """
    if regular_size(path) <= most:
        with path.open("rb") as file:
            if len(data := file.read(most + 1)) <= most:  # it may have grown, and some files do not tell their size
                return data
    raise FractalError(f"{path}: larger than {most >> 20} MiB, not a file of this format; fetch or build it again")
