"""Waiting work on several threads: as many at a time as asked for, ended by the first error or by Ctrl-C."""

import hashlib
import json
import queue
import random
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Generic, TypeVar

from fractalshards.digest import mapping_digest, sha256_file, systems_digest
from fractalshards.errors import FractalError, StoppedError, UsageError, interrupt_code
from fractalshards.fields import MAX_JSON_BYTES, Fields
from fractalshards.human import human_bytes, human_count
from fractalshards.manifest import (
    INFO,
    RECIPE,
    SYSTEMS,
    Manifest,
    Shard,
    find_manifest,
    parse_manifest,
    parse_record,
    read_record,
    sidecar_name,
    split_lists,
)
from fractalshards.remote.stores import (
    CARD,
    Advance,
    Change,
    GoogleStore,
    HttpSource,
    HubStore,
    Location,
    MismatchError,
    S3Store,
    Source,
    Store,
    StoreError,
    Told,
    Upload,
    dataset_card,
    file_pieces,
    parse_location,
    read_back,
    read_small,
)
from fractalshards.storage import atomic_file, passing_lock, read_bounded, remove_leftovers, write_bytes
from fractalshards.systems import MAX_SYSTEMS_BYTES, parse_systems
from fractalshards.workers import sigterm_interrupts

_GRACE_SECONDS = 3.0


class HaltedError(Exception):
    """Raised in a thread that shall end because another one failed, or the user wants it."""


class Brake:
    """Ends threads from outside: they call it often."""

    def __init__(self) -> None:
        self._pulled = threading.Event()

    def pull(self) -> None:
        """From now on ``check`` and ``wait`` raise."""
        self._pulled.set()

    def check(self) -> None:
        """Raise ``HaltedError`` if the brake was pulled."""
        if self._pulled.is_set():
            raise HaltedError

    def wait(self, seconds: float) -> None:
        """Sleep, but raise ``HaltedError`` as soon as the brake is pulled."""
        if self._pulled.wait(seconds):
            raise HaltedError


def run_threads(tasks: Sequence[Callable[[], None]], jobs: int, brake: Brake) -> None:
    """Run all tasks, ``jobs`` at a time; at the first error, or Ctrl-C, pull the brake and raise it.

    Threads get a moment to remove what they began. One that hangs in a dead connection is left behind: it does not
    keep the process from ending.
    """
    waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)

    def work() -> None:
        try:
            while True:
                brake.check()
                waiting.get_nowait()()
        except queue.Empty:
            ended.put(None)
        except BaseException as error:
            ended.put(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(jobs, len(tasks)))]
    for thread in threads:
        thread.start()
    try:
        for _ in threads:
            if error := ended.get():
                raise error
    except BaseException:
        brake.pull()
        raise
    finally:
        _join(threads)


def _join(threads: Iterable[threading.Thread]) -> None:
    deadline = time.monotonic() + _GRACE_SECONDS
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0))


_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")
_SHARD = re.compile(r"(train|val)-(\d{6})\.tar")


@dataclass(frozen=True)
class Listing:
    """A manifest as it is written, and what it says."""

    text: bytes
    manifest: Manifest

    def entries(self) -> "dict[str, Entry]":
        """Its shards by name."""
        return {entry.shard.name: entry for entry in entries(self.manifest)}


@dataclass(frozen=True)
class Entry:
    """A line of a manifest: a shard, and the index of its first sample."""

    split: str
    first: int
    shard: Shard


def parse_numbers(text: str) -> tuple[range, ...]:
    """``0-9,12`` as ranges of shard numbers.

    Raises:
        UsageError: if it is anything else.
    """
    ranges = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise UsageError(f"--shards {text}: expected numbers and ranges of shards such as 0-9,12")
        ranges.append(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(ranges)


def entries(manifest: Manifest) -> tuple[Entry, ...]:
    """All lines of a manifest, in order."""
    return tuple(
        Entry(split, first, shard)
        for split, shards in manifest.splits.items()
        for first, shard in zip(manifest.first_samples[split], shards, strict=True)
    )


def select(manifest: Manifest, wanted: Sequence[range] | None, where: str) -> tuple[Entry, ...]:
    """The lines of the wanted shards of every split; of all, if None.

    Raises:
        FractalError: if a shard's name is not as the format says.
        UsageError: if a wanted range has none of the shards at its ends.
    """
    numbers = {entry.shard.name: shard_number(entry.shard.name, where) for entry in entries(manifest)}
    if wanted is None:
        return entries(manifest)
    there = set(numbers.values())
    for end in (end for part in wanted for end in (part[0], part[-1])):
        if end not in there:
            raise UsageError(f"{where}: has no shard {end}; its numbers are {_spans(there)}")
    return tuple(entry for entry in entries(manifest) if any(numbers[entry.shard.name] in part for part in wanted))


def shard_number(name: str, where: str) -> int:
    """The number in a shard's name.

    Raises:
        FractalError: if it is not as the format says. Other plain names could be those of files that are no shards.
    """
    match = _SHARD.fullmatch(name)
    if match is None:
        raise FractalError(f"{where}: {name!r} is not the name of a shard, SPLIT-NNNNNN.tar; do not use this dataset")
    return int(match[2])


def check_same(one: Manifest, other: Manifest, where: str, advice: str) -> None:
    """Refuse to mix two datasets: their recipe, and the content of every shard that both list, must be the same.

    Raises:
        FractalError: naming ``where``, and the advice.
    """
    traits = [(m.recipe_digest, m.label_type, m.classes, m.image_size, m.class_names) for m in (one, other)]
    lines = [{e.shard.name: (e.split, e.first, e.shard.content_digest) for e in entries(m)} for m in (one, other)]
    differing = [name for name in lines[0].keys() & lines[1].keys() if lines[0][name] != lines[1][name]]
    if traits[0] != traits[1] or differing:
        what = f"{min(differing)} has other content" if differing else f"recipe digest {other.recipe_digest}"
        raise FractalError(f"{where}: holds another dataset ({what}); {advice}")


def write_listing(bases: Sequence[Listing], chosen: Collection[Entry]) -> bytes:
    """The text of a manifest that lists ``chosen``: that of a base if it lists just these.

    Args:
        bases: manifests of the same dataset; the other fields come from the first that has them.
    """
    for base in bases:
        if set(chosen) == set(entries(base.manifest)):
            return base.text
    others: dict[str, Any] = {}
    for base in reversed(bases):  # one at a time is in memory
        document = json.loads(base.text)
        others |= document["splits"]
    ordered = sorted(chosen, key=lambda entry: entry.first)
    names = list(dict.fromkeys(entry.split for entry in ordered))
    splits = {name: [entry for entry in ordered if entry.split == name] for name in names}
    whole = _counts_from_zero(ordered)
    document["splits"] = {
        name: _split_fields(name, {k: v for k, v in others[name].items() if k != "first_samples"}, part, whole)
        for name, part in splits.items()
    }
    return json.dumps(document, indent=1).encode() + b"\n"


def _split_fields(name: str, others: Mapping[str, Any], part: Sequence[Entry], whole: bool) -> dict[str, Any]:
    firsts = {} if whole else {"first_samples": [entry.first for entry in part]}
    return {**others, "name": name, **split_lists([entry.shard for entry in part]), **firsts}


def _counts_from_zero(ordered: Iterable[Entry]) -> bool:
    end = 0
    for entry in ordered:
        if entry.first != end:
            return False
        end += entry.shard.samples
    return True


def _spans(numbers: Iterable[int]) -> str:
    """``0-9, 12``"""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans[:20])


_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds before trying again, times 0.5 to 1.5; a minute in all
AGAIN = len(_DELAYS)
_FEW = 2  # times to try again where a URL was probably mistyped, or the bytes come from a damaged copy
_T = TypeVar("_T")
_S = TypeVar("_S", bound=Source, covariant=True)
_STORES: dict[str, Callable[[Location], Store]] = {"s3": S3Store, "gs": GoogleStore, "hf": HubStore}


@dataclass(frozen=True)
class Remote(Generic[_S]):
    """A folder that ``store`` reaches, ``shown`` in messages; it can be written to if that is a ``Store``.

    ``wait`` sleeps, for it may be made to end early; ``again`` is how often something that fails is tried again.
    """

    store: _S
    shown: str
    wait: Callable[[float], None] = time.sleep
    again: int = AGAIN

    def read(self, name: str, limit: int, again: int = _FEW) -> bytes | None:
        """A small file of at most ``limit`` bytes; None if it is not there.

        Raises:
            FractalError: if it is larger, or cannot be read.
        """
        return self._persist(name, lambda: read_small(self.store, name, limit), again)

    def fetch(self, name: str, path: Path, size: int, sha256: str, advance: Advance) -> None:
        """Fetch a file to ``path``, which appears when size and sha256 are those given.

        Raises:
            FractalError: if the file is not there, its bytes are others three times, or nothing came for a minute.
            OSError: as the local file system does.
        """
        with atomic_file(path) as file:
            download = _Download(self.store, name, file, size, sha256, advance)
            self._persist(name, download.go_on, progress=lambda: download.got)

    def send(self: "Remote[Store]", uploads: Sequence[Upload], advance: Advance) -> None:
        """Store files in this order, and check what arrived.

        A local file of other size or sha256 is refused. The other end is checked by its size and its sha256: in a
        folder the sha256 of the bytes as they were written; on S3 (files of up to 5 GiB) and for large files on
        Hugging Face that which the store computed; elsewhere by reading the file back.

        Raises:
            FractalError: if a local file is not that, or it cannot be stored.
            OSError: as the local file system does.
        """
        self._persist(uploads[0].name, lambda: self.store.put(uploads, advance))

    def update(self: "Remote[Store]", name: str, most: int, change: Change) -> None:
        """Write what ``change`` makes of a small file; see ``Store.update``. It may be called several times.

        Raises:
            FractalError: as ``change`` does, or if the file cannot be read or stored.
            OSError: as the local file system does.
        """
        self._persist(name, lambda: self.store.update(name, most, change))

    def holds(self: "Remote[Store]", name: str, size: int, sha256: str) -> bool:
        """Whether a file is there that was stored as this.

        A store that cannot tell the sha256 (gs) is believed by size; another one that does not know it of this file
        did not get it from ``send``, and it is read.

        Raises:
            FractalError: if it cannot be found out.
        """

        def compare() -> bool:
            told = self.store.told(name)
            if told is None or told.size != size:
                return False
            if told.sha256 is None and self.store.tells:
                told = read_back(self.store, name)
            return told.sha256 in (sha256, None)

        return self._persist(name, compare)

    def _persist(
        self, name: str, action: Callable[[], _T], again: int | None = None, progress: Callable[[], int] = lambda: 0
    ) -> _T:
        """What ``action`` returns, in the end; where ``progress`` grows between failures they do not add up."""
        again = self.again if again is None else again
        failures = mismatches = reached = 0
        while True:
            try:
                return action()
            except StoreError as error:
                if progress() > reached:
                    failures, reached = 0, progress()
                failures += 1
                mismatches += isinstance(error, MismatchError)
                if error.permanent or failures > again or mismatches > _FEW:
                    tries = "" if error.permanent else f" (tried {failures} times)"
                    raise FractalError(f"{self.shown}/{name}: {error}{tries}") from error
            self.wait(_DELAYS[min(failures, len(_DELAYS)) - 1] * random.uniform(0.5, 1.5))


def open_remote(url: str, wait: Callable[[float], None] = time.sleep, again: int = AGAIN) -> Remote[Source]:
    """The folder at a local path or a URL; nothing is asked of it yet. For ``wait`` and ``again`` see ``Remote``.

    Raises:
        UsageError: for URLs that are not taken.
        FractalError: if a package is missing.
    """
    location = parse_location(url)
    source = HttpSource(location) if location.scheme == "http" else _open_store(location)
    return Remote(source, location.shown, wait, again)


def open_destination(url: str, wait: Callable[[float], None] = time.sleep) -> Remote[Store]:
    """The folder at a local path or a URL, to write to; else as ``open_remote``.

    Raises:
        UsageError: for URLs of web servers, too.
    """
    location = parse_location(url)
    if location.scheme == "http":
        raise UsageError(f"{location.shown}: web servers are read only; give a local folder, s3://, gs:// or hf://")
    return Remote(_open_store(location), location.shown, wait)


def _open_store(location: Location) -> Store:
    if location.scheme == "file":
        return LocalStore(Path(location.root))
    try:
        return _STORES[location.scheme](location)
    except StoreError as error:
        raise FractalError(f"{location.shown}: {error}") from error


class _Download:
    """A download that can break, and go on where it broke."""

    def __init__(self, store: Source, name: str, file: BinaryIO, size: int, sha256: str, advance: Advance) -> None:
        self.got = 0
        self._store = store
        self._name = name
        self._file = file
        self._size = size
        self._sha256 = sha256
        self._advance = advance
        self._digest = hashlib.sha256()

    def go_on(self) -> None:
        """Fetch what is missing.

        Raises:
            StoreError: if it breaks, or all is there but is not what was promised; then it will start again.
        """
        with closing(self._store.chunks(self._name, self.got)) as chunks:
            while self.got < self._size and (chunk := next(chunks, b"")):
                self._keep(memoryview(chunk)[: self._size - self.got])
        if self.got < self._size:
            raise StoreError(f"ends after {self.got:,} of {self._size:,} bytes")
        if self._digest.hexdigest() != self._sha256:
            self._start_again()
            text = "damaged, its sha256 is not that in the manifest; it must be pushed again"
            raise MismatchError(text, permanent=self._store.steady)

    def _keep(self, piece: memoryview) -> None:
        self._file.write(piece)
        self._digest.update(piece)
        self.got += len(piece)
        self._advance(len(piece))

    def _start_again(self) -> None:
        self._advance(-self.got)
        self.got = 0
        self._digest = hashlib.sha256()
        self._file.seek(0)
        self._file.truncate()


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


ELSEWHERE = "choose another folder"
_TURNS = 20
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
    return Listing(text, replace(parse_manifest(text, Path(folder), where), software={}))


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
        return parse_record(text, shard.name, manifest.label_type, where).shard() == shard


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


def pull(url: str, folder: Path, wanted: Sequence[range] | None, jobs: int, meter: Meter) -> Moved:
    """Fetch a dataset, or the wanted shards of each split, into a local folder.

    Args:
        wanted: numbers of shards; None: all.
        jobs: files that travel at a time.

    Raises:
        FractalError: if there is no dataset, the folder holds another one, or something cannot be had whole.
        OSError: as the local file system does.
    """
    with stoppable(folder, jobs, meter) as work:
        remote = open_remote(url, work.brake.wait)
        theirs = read_listing(remote)
        chosen = select(theirs.manifest, wanted, remote.shown)
        ours = local_listing(folder) if (folder / INFO).is_file() else None
        if ours:
            check_same(theirs.manifest, ours.manifest, str(folder), ELSEWHERE)
        local = Remote(LocalStore(folder), str(folder), work.brake.wait)
        local.store.prepare()
        _pull_recipe(remote, folder, theirs.manifest)

        here = ours.entries() if ours else {}
        there = theirs.entries()
        listed = [here.get(entry.shard.name, entry) for entry in chosen]
        sized = {entry.shard.name for entry in listed if _has_size(folder, entry.shard)}
        doubtful = [entry for entry in listed if entry.shard.name in sized]
        damaged = work.missing(doubtful, partial(_is_here, folder, theirs.manifest))
        absent = [entry for entry in listed if entry.shard.name not in sized]
        missing = [there[entry.shard.name] for entry in (*absent, *damaged)]
        _check_space(folder, missing)
        if any(here.get(entry.shard.name, entry) != entry for entry in missing):
            (folder / INFO).unlink()  # another copy comes, which it does not describe
        work.move("pulling", missing, partial(_pull_shard, remote, folder, theirs.manifest))

        if ours and not missing and all(entry.shard.name in here for entry in chosen):
            return outcome(missing, chosen, str(folder), ours.manifest)
        return outcome(missing, chosen, str(folder), add_to_listing(local, theirs, chosen, missing, ours))


def fetch_sidecar(remote: Remote[Source], folder: Path, manifest: Manifest, shard: Shard) -> None:
    """Fetch a shard's sidecar record into ``folder``, and check it against the manifest.

    Raises:
        FractalError: if it is not there, or says anything else.
    """
    name = sidecar_name(shard.name)
    text = remote.read(name, MAX_JSON_BYTES, remote.again)
    where = f"{remote.shown}/{name}"
    if text is None:
        raise FractalError(f"{where}: not there; it must be pushed again")
    if not describes(text, manifest, shard, where):
        raise FractalError(f"{where}: manifest and sidecar disagree; it must be pushed again")
    write_bytes(folder / name, text)


def _pull_shard(remote: Remote[Source], folder: Path, manifest: Manifest, shard: Shard, advance: Advance) -> None:
    remote.fetch(shard.name, folder / shard.name, shard.bytes, shard.sha256, advance)
    fetch_sidecar(remote, folder, manifest, shard)


def _pull_recipe(remote: Remote[Source], folder: Path, manifest: Manifest) -> None:
    """Claim the folder: recipe first, then systems; both are checked by their digests."""
    text = remote.read(RECIPE, MAX_JSON_BYTES)
    if text is None:
        raise FractalError(f"{remote.shown}: no {RECIPE} there; it must be pushed again")
    check_recipe(text, manifest, f"{remote.shown}/{RECIPE}")
    if not (folder / RECIPE).exists():
        with suppress(FileExistsError), atomic_file(folder / RECIPE, exclusive=True) as file:  # another pull was first
            file.write(text)
    if Fields.read(folder / RECIPE).text("recipe_digest") != manifest.recipe_digest:
        raise FractalError(f"{folder}: holds another dataset ({RECIPE} differs); {ELSEWHERE}")
    if (folder / SYSTEMS).exists():
        systems = read_bounded(folder / SYSTEMS, MAX_SYSTEMS_BYTES)
        check_systems(systems, manifest, str(folder / SYSTEMS))
    elif (found := remote.read(SYSTEMS, MAX_SYSTEMS_BYTES)) is not None:
        check_systems(found, manifest, f"{remote.shown}/{SYSTEMS}")
        write_bytes(folder / SYSTEMS, found)
    elif "systems_digest" in manifest.recipe:
        raise FractalError(f"{remote.shown}: no {SYSTEMS} there; it must be pushed again")


def _has_size(folder: Path, shard: Shard) -> bool:
    path = folder / shard.name
    return path.is_file() and path.stat().st_size == shard.bytes


def _is_here(folder: Path, manifest: Manifest, shard: Shard) -> bool:
    """Whether a local shard has its sidecar and its sha256."""
    return is_described(folder, manifest, shard) and sha256_file(folder / shard.name) == shard.sha256


def _check_space(folder: Path, missing: Sequence[Entry]) -> None:
    wanted, (total, _, free) = sum(entry.shard.bytes for entry in missing), shutil.disk_usage(folder)
    if total and wanted > free:
        raise FractalError(
            f"{folder}: needs {human_bytes(wanted)}, the disk has {human_bytes(free)} free; "
            "free some space, choose another folder, or take fewer shards with --shards"
        )


_TOGETHER_BYTES = 10 * 10**9  # what a stopped command has to send again at the most


def push(folder: Path, url: str, wanted: Sequence[range] | None, jobs: int, meter: Meter) -> Moved:
    """Store a dataset, or the wanted shards of each split, elsewhere; see ``Remote.send`` for how it is checked.

    Args:
        wanted: numbers of shards; None: all.
        jobs: files that travel at a time.

    Raises:
        FractalError: if the folder holds no finished dataset or a damaged one, there is another dataset at the
            destination, or something cannot be stored.
        OSError: as the local file system does.
    """
    with stoppable(folder, jobs, meter) as work:
        remote = open_destination(url, work.brake.wait)
        ours = local_listing(folder)
        chosen = select(ours.manifest, wanted, str(folder))
        claim = _read_claim(folder, ours.manifest)
        theirs = find_listing(remote)
        if theirs:
            check_same(ours.manifest, theirs.manifest, remote.shown, ELSEWHERE)
        remote.store.prepare()
        _claim_remote(remote, claim, ours.manifest)

        there = theirs.entries() if theirs else {}
        here = ours.entries()
        listed = [there.get(entry.shard.name, entry) for entry in chosen]
        absent = work.missing(listed, lambda shard: _is_there(remote, ours.manifest, shard))
        missing = [here[entry.shard.name] for entry in absent]
        total = sum(entry.shard.bytes + _sidecar_bytes(folder, entry.shard) for entry in missing)
        groups = list(_groups(missing, remote.store.together))
        work.each("pushing", total, "B", groups, partial(_push_shards, remote, folder, ours.manifest))

        if remote.store.wants_card:
            splits = {name.partition("-")[0] for name in (*there, *(entry.shard.name for entry in chosen))}
            remote.update(CARD, MAX_JSON_BYTES, partial(dataset_card, splits=splits))
        if missing or not all(entry.shard.name in there for entry in chosen):
            return outcome(missing, chosen, remote.shown, add_to_listing(remote, ours, chosen, missing, theirs))
        return outcome(missing, chosen, remote.shown, theirs.manifest if theirs else ours.manifest)


def _push_shards(
    remote: Remote[Store], folder: Path, manifest: Manifest, shards: Sequence[Shard], advance: Advance
) -> None:
    """Store tars, each before its sidecar."""
    uploads = []
    for shard in shards:
        sidecar = folder / sidecar_name(shard.name)
        if not is_described(folder, manifest, shard):
            raise FractalError(f"{sidecar}: not there, or not what the manifest says; build the shard again")
        tar = Upload(shard.name, folder / shard.name, Told(shard.bytes, shard.sha256))
        uploads += [tar, Upload.of_file(sidecar)]
    remote.send(uploads, advance)


def _sidecar_bytes(folder: Path, shard: Shard) -> int:
    path = folder / sidecar_name(shard.name)
    return path.stat().st_size if path.exists() else 0


def _groups(listed: Sequence[Entry], most: int) -> Iterator[list[Shard]]:
    """Shards that go together: so many at the most, and not too many bytes."""
    group: list[Shard] = []
    for shard in (entry.shard for entry in listed):
        if group and (len(group) == most or sum(one.bytes for one in (*group, shard)) > _TOGETHER_BYTES):
            yield group
            group = []
        group.append(shard)
    if group:
        yield group


def _read_claim(folder: Path, manifest: Manifest) -> list[Upload]:
    """Recipe and systems of a local folder, checked."""
    recipe = read_bounded(folder / RECIPE, MAX_JSON_BYTES)
    check_recipe(recipe, manifest, str(folder / RECIPE))
    claim = [Upload.of_bytes(RECIPE, recipe)]
    if (folder / SYSTEMS).exists():
        systems = read_bounded(folder / SYSTEMS, MAX_SYSTEMS_BYTES)
        check_systems(systems, manifest, str(folder / SYSTEMS))
        claim.append(Upload.of_bytes(SYSTEMS, systems))
    return claim


def _claim_remote(remote: Remote[Store], claim: Sequence[Upload], manifest: Manifest) -> None:
    """Claim the other end: its recipe stays, if it is the same, and what else is missing is sent."""
    recipe, *others = claim
    text = remote.read(RECIPE, MAX_JSON_BYTES)
    if (
        text is not None
        and Fields.parse(text, f"{remote.shown}/{RECIPE}").text("recipe_digest") != manifest.recipe_digest
    ):
        raise FractalError(f"{remote.shown}: holds another dataset ({RECIPE} differs); {ELSEWHERE}")
    missing = [one for one in others if not remote.holds(one.name, one.told.size, str(one.told.sha256))]
    if uploads := [*([recipe] if text is None else []), *missing]:
        remote.send(uploads, lambda count: None)


def _recipe_digest(text: bytes, remote: Remote[Store]) -> str:
    return Fields.parse(text, f"{remote.shown}/{RECIPE}").text("recipe_digest")


def _is_there(remote: Remote[Store], manifest: Manifest, shard: Shard) -> bool:
    """Whether the other end has a shard whole, with its sidecar, which was sent after the tar was checked there."""
    if not remote.holds(shard.name, shard.bytes, shard.sha256):
        return False
    name = sidecar_name(shard.name)
    try:
        text = remote.read(name, MAX_JSON_BYTES)
        return text is not None and describes(text, manifest, shard, name)
    except FractalError:
        return False
