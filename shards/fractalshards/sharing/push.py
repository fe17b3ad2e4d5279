"""``fractalshards push``: stores a dataset, or some of its shards, in a folder elsewhere."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from fractalshards.errors import FractalError
from fractalshards.fields import MAX_JSON_BYTES, Fields
from fractalshards.files import read_bounded
from fractalshards.manifest import Manifest, Shard
from fractalshards.names import RECIPE, SYSTEMS, sidecar_name
from fractalshards.sharing.hub import CARD, dataset_card
from fractalshards.sharing.parts import Entry, check_same, select
from fractalshards.sharing.remote import Remote, open_destination
from fractalshards.sharing.stores import Advance, Store, Told, Upload
from fractalshards.sharing.transfer import (
    ELSEWHERE,
    Meter,
    Moved,
    add_to_listing,
    check_recipe,
    check_systems,
    describes,
    find_listing,
    is_described,
    local_listing,
    outcome,
    stoppable,
)
from fractalshards.systems import MAX_SYSTEMS_BYTES

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
