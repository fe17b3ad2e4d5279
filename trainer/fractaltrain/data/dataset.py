"""Opens shards for pre-training: ours, here or elsewhere, or any WebDataset folder with timm's ``_info.json``."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from fractalshards.console import progress, unseen
from fractalshards.errors import FractalError
from fractalshards.foreign import ForeignInfo, Listing, is_foreign, list_shards, listings_digest, load_foreign
from fractalshards.manifest import MAX_CLASSES, Manifest, load_manifest
from fractalshards.names import TRAINING
from fractalshards.sharing.cache import ShardCache
from fractaltrain.data.foreign import ForeignSource
from fractaltrain.data.shards import ShardSource
from fractaltrain.data.source import LabelledSource
from fractaltrain.world import World

HELD_OUT = ("val", "validation")  # what splits of held-out images are called


@dataclass(frozen=True)
class Dataset:
    """What is trained on.

    Attributes:
        held_out: None if there is no such split.
        image_size: side of its images in pixels, None if they differ or nobody knows.
        digest: tells datasets apart.
        kind: what its images are, as recipes distinguish them; empty for a foreign one.
        multi_label: its images show several classes each.
    """

    training: LabelledSource
    held_out: LabelledSource | None
    classes: int
    image_size: int | None
    digest: str
    kind: str = ""
    multi_label: bool = False


def open_dataset(folder: Path, world: World) -> Dataset:
    """Open a folder on every rank. Foreign tars are scanned by rank 0 while the others wait, once and for all.

    Raises:
        FractalError: if the dataset is missing, damaged or of another kind than can be trained on.
    """
    if is_foreign(folder):
        info = load_foreign(folder)
        with world.main_first():
            return _open_foreign(info, world)
    manifest = load_manifest(folder)
    return _ours(manifest, lambda split: ShardSource(manifest, split))


def open_cached(cache: ShardCache, window: int) -> Dataset:
    """A dataset of ours that lies elsewhere, behind the cache of its shards.

    Args:
        window: shards that training shuffles together; so many stay open, and of the held-out ones a single one.

    Raises:
        FractalError: as ``open_dataset`` does.
    """
    manifest = cache.manifest
    return _ours(manifest, lambda split: ShardSource(manifest, split, cache, window if split == TRAINING else 1))


def _ours(manifest: Manifest, open_split: Callable[[str], LabelledSource]) -> Dataset:
    training = open_split(TRAINING)
    return Dataset(
        training=training,
        held_out=next((open_split(name) for name in HELD_OUT if name in manifest.splits), None),
        classes=manifest.classes,
        image_size=manifest.image_size,
        digest=manifest.content_digest(),
        kind=str(manifest.recipe.get("kind", "")),
        multi_label=manifest.label_type == "multi",
    )


def _open_foreign(info: ForeignInfo, world: World) -> Dataset:
    names = [name for name in (TRAINING, *HELD_OUT) if name in info.splits][:2]
    if TRAINING not in names:
        found = ", ".join(info.splits) or "none"
        raise FractalError(f"{info.folder}: no split {TRAINING!r} to train on; it has {found}")
    shards = [shard for name in names for shard in info.splits[name]]
    listings = list_shards(shards, _show if world.main else unseen)
    classes = _count_classes(info, listings)
    sources, first = [], 0
    for name in names:
        paths = [path for path, _ in info.splits[name]]
        sources.append(ForeignSource(paths, listings[first : first + len(paths)], classes))
        first += len(paths)
    held_out = sources[1] if len(sources) > 1 else None
    return Dataset(sources[0], held_out, classes, None, listings_digest(listings))


def _show(tars: int) -> AbstractContextManager[Callable[[int], object]]:
    return progress("finding samples, once", tars, "tars")


def _count_classes(info: ForeignInfo, listings: tuple[Listing, ...]) -> int:
    """As ``_info.json`` says, else one more than the highest label."""
    highest = max((int(listing.labels.max()) for listing in listings if len(listing)), default=-1)
    classes = highest + 1 if info.classes is None else info.classes
    if not highest < classes <= MAX_CLASSES or not classes:
        raise FractalError(f"{info.folder}: labels reach {highest}, which does not fit {classes} classes")
    return classes
