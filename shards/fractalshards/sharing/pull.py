"""``fractalshards pull``: fetches a dataset, or some of its shards, from a folder elsewhere."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from fractalshards.atomic import atomic_file, write_bytes
from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError
from fractalshards.fields import MAX_JSON_BYTES, Fields
from fractalshards.files import read_bounded
from fractalshards.human import human_bytes
from fractalshards.manifest import Manifest, Shard
from fractalshards.names import INFO, RECIPE, SYSTEMS, sidecar_name
from fractalshards.sharing.folders import LocalStore
from fractalshards.sharing.parts import Entry, check_same, select
from fractalshards.sharing.remote import Remote, open_remote
from fractalshards.sharing.stores import Advance, Source
from fractalshards.sharing.transfer import (
    ELSEWHERE,
    Meter,
    Moved,
    add_to_listing,
    check_recipe,
    check_systems,
    describes,
    is_described,
    local_listing,
    outcome,
    read_listing,
    stoppable,
)
from fractalshards.systems import MAX_SYSTEMS_BYTES


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
