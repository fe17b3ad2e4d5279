"""Copy a dataset between a local folder and another place: ``push`` and ``pull``.

Recipe and systems claim the target, then shards are copied, each tar before its sidecar, and ``_info.json`` comes last.
Files that the target already holds are skipped, so the same command, run again, continues.
"""

import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import compress
from multiprocessing.pool import ThreadPool
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

from fractalshards.digest import systems_digest
from fractalshards.errors import FractalError, UsageError
from fractalshards.human import human_bytes, human_count
from fractalshards.manifest import INFO, RECIPE, SYSTEMS, Manifest, Shard, parse_manifest, parse_record, sidecar_name
from fractalshards.recipe_file import RecipeFile, recipe_problems
from fractalshards.remote.card import README, dataset_card
from fractalshards.remote.stores import FileInfo, LocalStore, Store, Upload, open_store
from fractalshards.storage import MAX_JSON_BYTES, atomic_file, check_space, parse_json, remove_leftovers
from fractalshards.systems import MAX_SYSTEMS_BYTES, parse_systems
from fractalshards.workers import OnProgress, no_progress, uninterrupted

_MANIFEST_ATTEMPTS = 3  # the URL may be mistyped
_traits = attrgetter("recipe_digest", "label_type", "classes", "image_size", "class_names")  # of a manifest
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class ManifestFile:
    """A manifest: its bytes, and what they say."""

    text: bytes
    manifest: Manifest

    def rows(self) -> dict[str, tuple[str, int, Shard]]:
        """Map the name of each shard to its split, the index of its first sample, and the shard."""
        return {
            shard.name: (split, first, shard)
            for split, shards in self.manifest.splits.items()
            for first, shard in zip(self.manifest.first_samples[split], shards, strict=True)
        }

    def of_shards(self, names: Collection[str]) -> bytes:
        """Return the manifest of some of the shards; for all shards, the same bytes."""
        if self.rows().keys() == names:
            return self.text
        document = json.loads(self.text)
        for split, firsts in self.manifest.first_samples.items():
            listed = document["splits"].pop(split) | {"first_samples": firsts}
            if any(keep := [name in names for name in listed["filenames"]]):
                fields = {k: [*compress(v, keep)] if isinstance(v, (list, tuple)) else v for k, v in listed.items()}
                document["splits"][split] = fields | {"num_samples": sum(fields["shard_lengths"])}
        return json.dumps(document, indent=1).encode() + b"\n"


@dataclass(frozen=True)
class TransferResult:
    """The shards that were copied, how many the target already held, where it is, and its manifest."""

    copied: Sequence[Shard]
    kept: int
    where: str
    manifest: Manifest

    def summary(self) -> str:
        """Return the result in one line."""
        size = human_bytes(sum(shard.bytes for shard in self.copied))
        kept = f", {human_count(self.kept, 'shard')} already there" if self.kept else ""
        copied = f"{human_count(len(self.copied), 'shard')} copied ({size}){kept}"
        return f"{copied}; {self.manifest.summary(self.where)}"


def push(
    folder: Path, url: str, wanted: Sequence[range] | None = None, jobs: int = 8, on_progress: OnProgress = no_progress
) -> TransferResult:
    """Copy a local dataset, or some of its shards, to a path or URL. Only missing or different files are sent.

    ``wanted`` are shard numbers of each split, None for all. ``jobs`` files are transferred at a time. ``on_progress``
    is called with bytes done and bytes in all, after each shard.

    Raises FractalError if the folder holds no finished dataset or a damaged one, the destination holds another dataset
    or lists other shards, or something cannot be stored; OSError if a local file cannot be read or written.
    """
    target = open_store(url)
    if target.location.scheme == "http":
        raise UsageError(f"{target.shown}: web servers are read only; give a local folder, s3://, gs:// or hf://")
    return _copy_dataset(LocalStore(folder), target, wanted, False, jobs, on_progress)


def pull(
    url: str, folder: Path, wanted: Sequence[range] | None = None, jobs: int = 8, on_progress: OnProgress = no_progress
) -> TransferResult:
    """Fetch a dataset, or some of its shards, into a local folder; see ``push``. Shards listed there stay listed."""
    return _copy_dataset(open_store(url), LocalStore(folder), wanted, True, jobs, on_progress)


def _copy_dataset(
    source: Store, target: Store, wanted: Sequence[range] | None, add: bool, jobs: int, on_progress: OnProgress
) -> TransferResult:
    ours, theirs = read_manifest(source), _find_manifest(target)
    chosen = select_shards(ours.manifest, wanted, source.shown)
    names = _listed_names(ours, {shard.name for shard in chosen}, theirs, target.shown, add)
    recipe = [*_read_recipe(source, ours.manifest)]
    claim, where = target.read(RECIPE, MAX_JSON_BYTES), f"{target.shown}/{RECIPE}"
    if claim is not None and parse_json(claim, RecipeFile, where).recipe_digest != ours.manifest.recipe_digest:
        raise FractalError(f"{where}: recipe of another dataset; choose another folder")
    if isinstance(target, LocalStore):
        _prepare_folder(target.folder, chosen)
    if missing := [file for file in recipe if not target.holds(file.name, file.info)]:
        target.put(missing)

    batches = [chosen[start : start + target.batch_size] for start in range(0, len(chosen), target.batch_size)]
    copy = partial(_copy_shards, source, target, ours.manifest)
    results = run_tasks(copy, batches, lambda batch: sum(shard.bytes for shard in batch), jobs, on_progress)
    copied = [shard for batch in results for shard in batch]

    if target.needs_card and target.read(README, MAX_JSON_BYTES) is None:
        own = source.read(README, MAX_JSON_BYTES)
        listed = parse_manifest(ours.of_shards(names), Path(source.location.root), INFO)
        target.put(dataset_card(listed, target.location) if own is None else [Upload.of_bytes(README, own)])
    if theirs is None or theirs.rows().keys() != names:
        if target.read(INFO, MAX_JSON_BYTES) != (theirs.text if theirs else None):
            raise FractalError(f"{target.shown}/{INFO}: changed by someone else; run the same command again")
        target.put([Upload.of_bytes(INFO, ours.of_shards(names))])
        theirs = read_manifest(target)
    return TransferResult(copied, len(chosen) - len(copied), target.shown, theirs.manifest)


def _copy_shards(source: Store, target: Store, manifest: Manifest, shards: Sequence[Shard]) -> list[Shard]:
    """Copy the shards that the target does not hold yet; return them."""
    missing = [
        shard
        for shard in shards
        if find_sidecar(target, manifest, shard) is None
        or not target.holds(shard.name, FileInfo(shard.bytes, shard.sha256))
    ]
    uploads = []
    for shard in missing:
        sidecar = read_sidecar(source, manifest, shard)
        if isinstance(target, LocalStore):
            with atomic_file(target.folder / shard.name) as file:
                source.fetch(shard.name, file, FileInfo(shard.bytes, shard.sha256))
        elif isinstance(source, LocalStore):
            uploads.append(Upload(shard.name, source.folder / shard.name, FileInfo(shard.bytes, shard.sha256)))
        uploads.append(sidecar)
    if uploads:
        target.put(uploads)
    return missing


def _prepare_folder(folder: Path, shards: Sequence[Shard]) -> None:
    """Create a folder for shards, remove leftovers of killed writers, and check that the disk has room."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.tar")}
    missing = sum(shard.bytes for shard in shards if sizes.get(shard.name) != shard.bytes)
    check_space(folder, missing, "choose another folder, or take fewer shards with --shards")


def run_tasks(
    task: Callable[[_T], _R], items: Sequence[_T], weigh: Callable[[_T], int], jobs: int, on_progress: OnProgress
) -> list[_R]:
    """Run a task for each item on ``jobs`` threads; return the results in the order in which they arrive.

    Progress counts the weights of items. After a failure no further task starts, and running tasks finish. Ctrl-C does
    not wait for tasks: the threads are daemons, which end with the process.
    """
    done, total, results = 0, sum(map(weigh, items)), []
    with uninterrupted():  # a pool that is half made prints a traceback
        made = ThreadPool(jobs)
    with made as pool:
        try:
            for item, result in pool.imap_unordered(lambda item: (item, task(item)), items):
                results.append(result)
                done += weigh(item)
                on_progress(done, total)
        except Exception:
            pool.terminate()
            pool.join()
            raise
        except KeyboardInterrupt:
            for name in ("asyncio", Store.__module__):  # they would report every request that is cut off
                logging.getLogger(name).setLevel(logging.CRITICAL)
            raise
    return results


def select_shards(manifest: Manifest, wanted: Sequence[range] | None, where: str) -> list[Shard]:
    """Return the shards of every split whose number, NNNNNN in their name, is in one of the ranges; all, if None."""
    numbers = {shard: int(shard.name[-10:-4]) for shards in manifest.splits.values() for shard in shards}
    for end in (end for part in wanted or () for end in (part[0], part[-1])):
        if end not in numbers.values():
            raise UsageError(f"{where}: no shard {end}; the last one is {max(numbers.values(), default=0)}")
    return [shard for shard, number in numbers.items() if wanted is None or any(number in part for part in wanted)]


def read_manifest(store: Store) -> ManifestFile:
    """Read the manifest of a dataset; raises FractalError if there is none, or it is not valid."""
    found = _find_manifest(store)
    if found is None:
        raise FractalError(f"{store.shown}: no {INFO}, so not a finished dataset; check the path or URL, or finish it")
    return found


def _find_manifest(store: Store) -> ManifestFile | None:
    text, where = store.read(INFO, MAX_JSON_BYTES, _MANIFEST_ATTEMPTS), f"{store.shown}/{INFO}"
    if text is None:
        return None
    return ManifestFile(text, parse_manifest(text, Path(store.shown), where))


def read_sidecar(store: Store, manifest: Manifest, shard: Shard) -> Upload:
    """Return a shard's sidecar; raise FractalError if it is missing, not valid, or contradicts the manifest."""
    name = sidecar_name(shard.name)
    text = find_sidecar(store, manifest, shard)
    if text is None:
        raise FractalError(f"{store.shown}/{name}: missing or contradicts the manifest; build or push it again")
    return Upload.of_bytes(name, text)


def find_sidecar(store: Store, manifest: Manifest, shard: Shard) -> bytes | None:
    """Return a shard's sidecar; None if it is missing, not valid, or contradicts the manifest."""
    text = store.read(sidecar_name(shard.name), MAX_JSON_BYTES)
    with suppress(FractalError):
        if text is not None and parse_record(text, shard.name, manifest.label_type, "").shard() == shard:
            return text
    return None


def _listed_names(ours: ManifestFile, chosen: set[str], theirs: ManifestFile | None, where: str, add: bool) -> set[str]:
    """Return the names of the shards that the target's manifest will list: those it lists now, and the chosen ones.

    Raises FractalError if the target holds another dataset or another copy of it, or lists shards that are not chosen,
    or, if ``add``, not ours.
    """
    if theirs is None:
        return chosen
    one, other = ours.rows(), theirs.rows()
    differing = [name for name in one.keys() & other.keys() if one[name] != other[name]]
    if differing or _traits(ours.manifest) != _traits(theirs.manifest):
        raise FractalError(f"{where}: holds another dataset, or another copy of this one; choose another folder")
    if not (other.keys() >= chosen or other.keys() <= (one.keys() if add else chosen)):
        raise FractalError(f"{where}: lists other shards of this dataset; include them in --shards, or leave it out")
    return other.keys() | chosen


def _read_recipe(store: Store, manifest: Manifest) -> Iterator[Upload]:
    """Yield recipe and systems, checked against the manifest and their digests."""
    expected = manifest.recipe.get("systems_digest")
    for name, most in ((RECIPE, MAX_JSON_BYTES), *([(SYSTEMS, MAX_SYSTEMS_BYTES)] if expected else [])):
        data, where = store.read(name, most), f"{store.shown}/{name}"
        if data is None:
            raise FractalError(f"{where}: missing; build or push it again")
        if name == RECIPE:
            recipe = parse_json(data, RecipeFile, where)
            for problem in recipe_problems(recipe.recipe, recipe.recipe_digest, manifest):
                raise FractalError(f"{where}: {problem}; do not use this dataset")
        elif systems_digest(parse_systems(data, where)) != expected:
            raise FractalError(f"{where}: not the systems that the recipe names; build or push it again")
        yield Upload.of_bytes(name, data)
