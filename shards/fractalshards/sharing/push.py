"""``fractalshards push``: stores a dataset, or some of its shards, in a folder elsewhere."""

import hashlib
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fractalshards.atomic import remove_leftovers
from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError
from fractalshards.fields import Fields
from fractalshards.manifest import Manifest, Shard, read_record
from fractalshards.names import INFO, RECIPE, SYSTEMS, sidecar_name
from fractalshards.sharing.parts import check_same, select, write_listing
from fractalshards.sharing.remote import Advance, Remote, open_remote
from fractalshards.sharing.stores import LocalStore
from fractalshards.sharing.transfer import (
    ELSEWHERE,
    JSON_BYTES,
    Meter,
    Moved,
    check_recipe,
    check_systems,
    describes,
    find_listing,
    local_listing,
    merged,
    outcome,
    read_listing,
    stoppable,
)


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
        remote = open_remote(url, work.brake.wait, write=True)
        ours = local_listing(folder)
        chosen = select(ours.manifest, wanted, str(folder))
        check_recipe((folder / RECIPE).read_bytes(), ours.manifest, str(folder / RECIPE))
        if (folder / SYSTEMS).exists():
            check_systems(folder / SYSTEMS, ours.manifest, str(folder / SYSTEMS))
        theirs = find_listing(remote)
        if theirs:
            check_same(ours.manifest, theirs.manifest, remote.shown, ELSEWHERE)
        _claim_remote(remote, folder, ours.manifest)

        there = theirs.entries() if theirs else {}
        here = ours.entries()
        listed = [there.get(entry.shard.name, entry) for entry in chosen]
        absent = work.missing(listed, lambda shard: _is_there(remote, ours.manifest, shard))
        missing = [here[entry.shard.name] for entry in absent]
        work.move("pushing", missing, partial(_push_shard, remote, folder, ours.manifest))

        text = write_listing([ours, theirs] if theirs else [ours], merged(chosen, there, missing))
        if not theirs or text != theirs.text:
            _send_bytes(remote, INFO, text)
        if remote.read(INFO, JSON_BYTES) != text:
            raise FractalError(
                f"{remote.shown}/{INFO}: changed since it was sent; see who else pushes there, push again"
            )
        return outcome(missing, chosen, remote.shown, read_listing(remote).manifest)


def _push_shard(remote: Remote, folder: Path, manifest: Manifest, shard: Shard, advance: Advance) -> None:
    if read_record(folder, shard.name, manifest.label_type).shard() != shard:
        raise FractalError(f"{folder / sidecar_name(shard.name)}: manifest and sidecar disagree; build the shard again")
    remote.send(folder / shard.name, shard.name, shard.bytes, shard.sha256, advance)
    _send_file(remote, folder / sidecar_name(shard.name))


def _claim_remote(remote: Remote, folder: Path, manifest: Manifest) -> None:
    """Claim the other end by recipe and systems; a local folder is made."""
    if isinstance(remote.store, LocalStore):
        remote.store.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(remote.store.folder)
    text = remote.read(RECIPE, JSON_BYTES)
    if text is None:
        _send_file(remote, folder / RECIPE)
    elif Fields.parse(text, f"{remote.shown}/{RECIPE}").text("recipe_digest") != manifest.recipe_digest:
        raise FractalError(f"{remote.shown}: holds another dataset ({RECIPE} differs); {ELSEWHERE}")
    if (path := folder / SYSTEMS).exists() and not remote.holds(SYSTEMS, path.stat().st_size, sha256_file(path)):
        _send_file(remote, path)


def _is_there(remote: Remote, manifest: Manifest, shard: Shard) -> bool:
    """Whether the other end has a shard whole, with its sidecar, which was sent after the tar was checked there."""
    if not remote.holds(shard.name, shard.bytes, shard.sha256):
        return False
    name = sidecar_name(shard.name)
    text = remote.read(name, JSON_BYTES)
    try:
        return text is not None and describes(text, manifest, shard, name)
    except FractalError:
        return False


def _send_file(remote: Remote, path: Path) -> None:
    remote.send(path, path.name, path.stat().st_size, sha256_file(path), lambda count: None)


def _send_bytes(remote: Remote, name: str, text: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(text)
        remote.send(Path(folder) / name, name, len(text), hashlib.sha256(text).hexdigest(), lambda count: None)
