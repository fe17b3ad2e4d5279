"""A folder of this machine as a store: what is written is hashed on the way, and fsynced."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fractalshards.atomic import atomic_file, remove_leftovers, write_bytes
from fractalshards.digest import sha256_file
from fractalshards.sharing.locks import passing_lock
from fractalshards.sharing.stores import Advance, Change, Told, Upload, file_pieces, read_small

_LOCK = ".tmp~lock~"  # readers ignore it, and the next build or transfer removes one that was left


@dataclass(frozen=True)
class LocalStore:
    """See ``Store``."""

    folder: Path
    steady: ClassVar[bool] = True
    tells: ClassVar[bool] = True
    together: ClassVar[int] = 1
    wants_card: ClassVar[bool] = False

    def prepare(self) -> None:
        """See ``Store``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)

    def chunks(self, name: str, start: int) -> Generator[bytes | memoryview]:
        """See ``Source``."""
        return file_pieces(self.folder / name, start)

    def told(self, name: str) -> Told | None:
        """See ``Store``. Files are hashed, for that is as fast as reading them."""
        path = self.folder / name
        return Told(path.stat().st_size, sha256_file(path)) if path.is_file() else None

    def put(self, uploads: Sequence[Upload], advance: Advance) -> None:
        """See ``Store``."""
        for upload in uploads:
            with atomic_file(self.folder / upload.name) as file:
                for piece in upload.pieces():
                    file.write(piece)
                    advance(len(piece))

    def update(self, name: str, most: int, change: Change) -> None:
        """See ``Store``. Others on this machine, and on file systems that lock across machines, wait meanwhile."""
        with passing_lock(self.folder / f"{_LOCK}{name}"):
            before = read_small(self, name, most)
            if (after := change(before)) != before:
                write_bytes(self.folder / name, after)
