"""What ``push`` and ``pull`` share: how they are run, shown and stopped, and what they check.

What travels, in this order: ``recipe.json``, which claims the folder, ``systems.npz``, then shards, each before its
sidecar, and the manifest last. Only what is missing or different travels, so the same command continues what was
stopped. Where both ends have a shard of equal content, each keeps its own copy, whose sha256 may differ.
"""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fractalshards.console import interrupt_code
from fractalshards.digest import mapping_digest, systems_digest
from fractalshards.errors import FractalError, StoppedError
from fractalshards.fields import Fields
from fractalshards.human import human_bytes, human_count
from fractalshards.manifest import Manifest, Shard, load_manifest, parse_manifest, parse_record
from fractalshards.names import INFO
from fractalshards.sharing.parts import Entry, Listing
from fractalshards.sharing.remote import Advance, Remote
from fractalshards.sharing.threads import Brake, run_threads
from fractalshards.systems import read_systems
from fractalshards.workers import sigterm_interrupts

JSON_BYTES = 16 << 20  # as ``fields`` reads
ELSEWHERE = "choose another folder"

Meter = Callable[[str, int, str], AbstractContextManager[Advance]]
"""Shows progress: label, total, unit; as ``console.progress``."""


@dataclass(frozen=True)
class Moved:
    """What a transfer did: the shards that travelled and those that were there, and what is now where."""

    shards: int
    bytes: int
    kept: int
    where: str
    manifest: Manifest

    def summary(self) -> str:
        """In one line."""
        moved = f"{human_count(self.shards, 'shard')} moved ({human_bytes(self.bytes)})"
        kept = f", {human_count(self.kept, 'shard')} there already" if self.kept else ""
        return f"{moved}{kept}; {self.where}: {self.manifest.contents()}"


@dataclass(frozen=True)
class Work:
    """How work is spread over threads, and shown."""

    jobs: int
    meter: Meter
    brake: Brake

    def move(self, label: str, listed: Sequence[Entry], task: Callable[[Shard, Advance], None]) -> None:
        """Run a task that moves a shard for each of those listed."""
        self.each(label, sum(entry.shard.bytes for entry in listed), "B", listed, task)

    def missing(self, listed: Sequence[Entry], there: Callable[[Shard], bool]) -> list[Entry]:
        """Those shards that are not there."""
        sound: set[str] = set()

        def check(shard: Shard, advance: Advance) -> None:
            if there(shard):
                sound.add(shard.name)
            advance(1)

        self.each("checking what is there", len(listed), "shards", listed, check)
        return [entry for entry in listed if entry.shard.name not in sound]

    def each(
        self, label: str, total: int, unit: str, listed: Sequence[Entry], task: Callable[[Shard, Advance], None]
    ) -> None:
        """Run a task for each shard listed; together they advance by ``total`` units."""
        if not listed:
            return
        lock = threading.Lock()
        with self.meter(label, total, unit) as show:

            def advance(count: int) -> None:
                self.brake.check()
                with lock:
                    show(count)

            run_threads([partial(task, entry.shard, advance) for entry in listed], self.jobs, self.brake)


@contextmanager
def stoppable(folder: Path, jobs: int, meter: Meter) -> Iterator[Work]:
    """Let Ctrl-C and SIGTERM end the work, and say how to go on."""
    try:
        with sigterm_interrupts():
            yield Work(jobs, meter, Brake())
    except KeyboardInterrupt as error:
        text = f"{folder}: stopped; what was moved is kept, run the same command again to go on"
        raise StoppedError(text, interrupt_code(error)) from error


def find_listing(remote: Remote) -> Listing | None:
    """The manifest of a dataset elsewhere, if there is one.

    Raises:
        FractalError: if it is not valid.
    """
    text = remote.read(INFO, JSON_BYTES)
    where = f"{remote.shown}/{INFO}"
    return None if text is None else Listing(text, parse_manifest(Fields.parse(text, where), Path(remote.shown), where))


def read_listing(remote: Remote) -> Listing:
    """The manifest of a dataset elsewhere.

    Raises:
        FractalError: if there is none, or it is not valid.
    """
    listing = find_listing(remote)
    if listing is None:
        raise FractalError(f"{remote.shown}: no {INFO} there, so no finished dataset; check the URL, or push it again")
    return listing


def local_listing(folder: Path) -> Listing:
    """The manifest of a local dataset; raises as ``load_manifest`` does."""
    manifest = load_manifest(folder)
    return Listing((folder / INFO).read_bytes(), manifest)


def outcome(moved: Sequence[Entry], chosen: Sequence[Entry], where: str, manifest: Manifest) -> Moved:
    """What is to be said in the end: of the chosen shards those that travelled, and what is now where."""
    return Moved(len(moved), sum(entry.shard.bytes for entry in moved), len(chosen) - len(moved), where, manifest)


def merged(chosen: Sequence[Entry], before: Mapping[str, Entry], moved: Sequence[Entry]) -> Collection[Entry]:
    """What a folder lists in the end: what it listed before keeps its line, unless another copy came."""
    return {**_by_name(chosen), **before, **_by_name(moved)}.values()


def _by_name(listed: Sequence[Entry]) -> dict[str, Entry]:
    return {entry.shard.name: entry for entry in listed}


def describes(text: bytes, manifest: Manifest, shard: Shard, where: str) -> bool:
    """Whether a sidecar says of a shard what the manifest says; an invalid one raises FractalError."""
    return parse_record(Fields.parse(text, where), shard.name, manifest.label_type, where).shard() == shard


def check_recipe(text: bytes, manifest: Manifest, where: str) -> None:
    """Refuse a ``recipe.json`` that is not that of the manifest, or whose digest is not right."""
    fields = Fields.parse(text, where)
    if fields.text("recipe_digest") != manifest.recipe_digest or fields.mapping("recipe") != manifest.recipe:
        raise FractalError(f"{where}: recipe and manifest disagree; do not use this dataset")
    if mapping_digest(manifest.recipe) != manifest.recipe_digest:
        raise FractalError(f"{where}: does not match its recipe digest; do not use this dataset")


def check_systems(path: Path, manifest: Manifest, where: str) -> None:
    """Refuse a ``systems.npz`` that is not that of the manifest's recipe."""
    try:
        found = systems_digest(read_systems(path))
    except FractalError as error:
        raise FractalError(f"{where}: damaged; remove it, or restore it") from error
    if found != manifest.recipe.get("systems_digest", found):
        raise FractalError(f"{where}: not the systems that the recipe names; remove it, or restore it")
