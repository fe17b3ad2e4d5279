"""What ``push`` and ``pull`` share: how they are run, shown and stopped, and what they check.

What travels, in this order: ``recipe.json``, which claims the folder, ``systems.npz``, then shards, each before its
sidecar, and the manifest last. Only what is missing or different travels, so the same command continues what was
stopped. Where both ends have a shard of equal content, each keeps its own copy, whose sha256 may differ.
"""

import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from fractalshards.console import interrupt_code
from fractalshards.digest import mapping_digest, systems_digest
from fractalshards.errors import FractalError, StoppedError
from fractalshards.fields import MAX_JSON_BYTES, Fields
from fractalshards.files import read_bounded
from fractalshards.human import human_bytes, human_count
from fractalshards.manifest import Manifest, Shard, find_manifest, parse_manifest, parse_record, read_record
from fractalshards.names import INFO
from fractalshards.sharing.parts import Entry, Listing, check_same, entries, write_listing
from fractalshards.sharing.remote import Remote
from fractalshards.sharing.stores import Advance, Source, Store
from fractalshards.sharing.threads import Brake, run_threads
from fractalshards.systems import parse_systems
from fractalshards.workers import sigterm_interrupts

ELSEWHERE = "choose another folder"
_TURNS = 20
_T = TypeVar("_T")
_PARSING = threading.Lock()  # one sidecar at a time: a hostile one takes 400 MB when it is parsed

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
        total = sum(entry.shard.bytes for entry in listed)
        self.each(label, total, "B", [entry.shard for entry in listed], task)

    def missing(self, listed: Sequence[Entry], there: Callable[[Shard], bool]) -> list[Entry]:
        """Those shards that are not there."""
        sound: set[str] = set()

        def check(shard: Shard, advance: Advance) -> None:
            if there(shard):
                sound.add(shard.name)
            advance(1)

        self.each("checking what is there", len(listed), "shards", [entry.shard for entry in listed], check)
        return [entry for entry in listed if entry.shard.name not in sound]

    def each(self, label: str, total: int, unit: str, items: Sequence[_T], task: Callable[[_T, Advance], None]) -> None:
        """Run a task for each item; together they advance by ``total`` units."""
        if not items:
            return
        lock = threading.Lock()
        with self.meter(label, total, unit) as show:

            def advance(count: int) -> None:
                self.brake.check()
                with lock:
                    show(count)

            run_threads([partial(task, item, advance) for item in items], self.jobs, self.brake)


@contextmanager
def stoppable(folder: Path, jobs: int, meter: Meter) -> Iterator[Work]:
    """Let Ctrl-C and SIGTERM end the work, and say how to go on."""
    try:
        with sigterm_interrupts():
            yield Work(jobs, meter, Brake())
    except KeyboardInterrupt as error:
        text = f"{folder}: stopped; what was moved is kept, run the same command again to go on"
        raise StoppedError(text, interrupt_code(error)) from error


def parse_listing(text: bytes, folder: str) -> Listing:
    """A manifest that came from ``folder``, without its software, which may be large and which no transfer needs.

    Raises:
        FractalError: if it is not valid.
    """
    where = f"{folder}/{INFO}"
    return Listing(text, replace(parse_manifest(Fields.parse(text, where), Path(folder), where), software={}))


def find_listing(remote: Remote[Source]) -> Listing | None:
    """The manifest of a dataset elsewhere, if there is one; raises as ``parse_listing`` does."""
    text = remote.read(INFO, MAX_JSON_BYTES)
    return None if text is None else parse_listing(text, remote.shown)


def read_listing(remote: Remote[Source]) -> Listing:
    """The manifest of a dataset elsewhere.

    Raises:
        FractalError: if there is none, or it is not valid.
    """
    listing = find_listing(remote)
    if listing is None:
        raise FractalError(f"{remote.shown}: no {INFO} there, so no finished dataset; check the URL, or push it again")
    return listing


def local_listing(folder: Path) -> Listing:
    """The manifest of a local dataset.

    Raises:
        FractalError: if folder or manifest is missing, or it is not valid.
        OSError: as the file system does.
    """
    return parse_listing(read_bounded(find_manifest(folder), MAX_JSON_BYTES), str(folder))


def add_to_listing(
    remote: Remote[Store], source: Listing, chosen: Sequence[Entry], moved: Sequence[Entry], before: Listing | None
) -> Manifest:
    """List the chosen shards in a folder beside what is listed there by then: others may move their parts meanwhile.

    What the folder listed ``before``, or lists now, keeps its line, unless another copy ``moved``.

    Raises:
        FractalError: if the folder lists another dataset by then, or loses what was listed again and again.
    """
    first = before.entries() if before else {}

    def change(text: bytes | None) -> bytes:
        now = parse_listing(text, remote.shown) if text is not None else None
        if now:
            check_same(source.manifest, now.manifest, remote.shown, ELSEWHERE)
        lines = {**_by_name(chosen), **first, **(now.entries() if now else {}), **_by_name(moved)}
        bases = [source, *(listing for listing in (now, before) if listing)]
        written = write_listing(bases, lines.values())
        if len(written) > MAX_JSON_BYTES:
            raise FractalError(f"{remote.shown}/{INFO}: would be larger than {MAX_JSON_BYTES >> 20} MiB")
        return written

    for _ in range(_TURNS):
        remote.update(INFO, MAX_JSON_BYTES, change)
        manifest = read_listing(remote).manifest
        if _by_name(chosen).keys() <= _by_name(entries(manifest)).keys():
            return manifest
        remote.wait(random.uniform(0, 1))
    raise FractalError(f"{remote.shown}/{INFO}: somebody overwrites it again and again; see who, and run this again")


def outcome(moved: Sequence[Entry], chosen: Sequence[Entry], where: str, manifest: Manifest) -> Moved:
    """What is to be said in the end: of the chosen shards those that travelled, and what is now where."""
    return Moved(len(moved), sum(entry.shard.bytes for entry in moved), len(chosen) - len(moved), where, manifest)


def describes(text: bytes, manifest: Manifest, shard: Shard, where: str) -> bool:
    """Whether a sidecar says of a shard what the manifest says; an invalid one raises FractalError."""
    with _PARSING:
        return parse_record(Fields.parse(text, where), shard.name, manifest.label_type, where).shard() == shard


def is_described(folder: Path, manifest: Manifest, shard: Shard) -> bool:
    """Whether a local sidecar is there, valid, and says of a shard what the manifest says."""
    try:
        with _PARSING:
            return read_record(folder, shard.name, manifest.label_type).shard() == shard
    except (FractalError, OSError):
        return False


def check_recipe(text: bytes, manifest: Manifest, where: str) -> None:
    """Refuse a ``recipe.json`` that is not that of the manifest, or whose digest is not right."""
    fields = Fields.parse(text, where)
    if fields.text("recipe_digest") != manifest.recipe_digest or fields.mapping("recipe") != manifest.recipe:
        raise FractalError(f"{where}: recipe and manifest disagree; do not use this dataset")
    if mapping_digest(manifest.recipe) != manifest.recipe_digest:
        raise FractalError(f"{where}: does not match its recipe digest; do not use this dataset")


def check_systems(data: bytes, manifest: Manifest, where: str) -> None:
    """Refuse the bytes of a ``systems.npz`` that is not that of the manifest's recipe."""
    try:
        found = systems_digest(parse_systems(data, where))
    except FractalError as error:
        raise FractalError(f"{where}: damaged; remove it, or restore it") from error
    if found != manifest.recipe.get("systems_digest", found):
        raise FractalError(f"{where}: not the systems that the recipe names; remove it, or restore it")


def _by_name(listed: Iterable[Entry]) -> dict[str, Entry]:
    return {entry.shard.name: entry for entry in listed}
