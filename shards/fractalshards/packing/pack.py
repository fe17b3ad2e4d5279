"""Packs a dataset: list -> recipe -> shard tasks -> worker processes -> tars and sidecars -> manifest."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fractalshards.assemble import Contents, ShardTask, finished_shards, publish, refuse_vanished, run_jobs
from fractalshards.atomic import remove_leftovers
from fractalshards.claim import claim_folder, refuse_other, stored_recipe
from fractalshards.errors import FractalError, UsageError
from fractalshards.images import PNG, image_format
from fractalshards.labels import encode_label
from fractalshards.manifest import MAX_SAMPLES, MAX_SHARD_SIZE, MAX_SHARDS, ShardRecord
from fractalshards.names import sample_key, shard_name
from fractalshards.packing.listing import ImageListing, Part
from fractalshards.packing.order import deal, shuffled
from fractalshards.packing.source import Source
from fractalshards.png import decode_image, encode_png
from fractalshards.tarball import Sample
from fractalshards.workers import worker_pool
from fractalshards.writer import Encoded, check_size, write_samples

RECIPE_VERSION = 1  # raised whenever another dataset is made of the same files
_ADVICE = "replace {them} and run the same command again, or remove {them} and pack into a new folder"
_NAMED = 10  # of the images that cannot be packed


@dataclass(frozen=True)
class PackRecipe:
    """What a packed dataset is: equal recipes of files with equal bytes give equal samples.

    Attributes:
        kind: of the source, ``imagefolder`` or ``imagenet``.
        n: samples of the split ``train``.
        val: samples of the split ``val``.
        classes: number of classes.
        seed: of the order of the images, and of which are held out.
        shard_size: samples per shard.
        val_share: of the images of every class, if they were dealt to the splits; else None.
        files: digest of the list of files.
    """

    kind: str
    n: int
    val: int
    classes: int
    seed: int
    shard_size: int
    val_share: float | None
    files: str
    version: int = RECIPE_VERSION

    def __post_init__(self) -> None:
        if not 1 <= self.shard_size <= MAX_SHARD_SIZE:
            raise UsageError(f"shard_size is {self.shard_size}: a shard has 1 to {MAX_SHARD_SIZE:,} samples")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed}: it may be 0 to 2**63 - 1")
        if self.n + self.val > MAX_SAMPLES:
            raise UsageError(f"{self.n + self.val:,} images are over {MAX_SAMPLES:,}: pack several datasets")
        if (shards := (self.n + self.val) // self.shard_size) > MAX_SHARDS:
            raise UsageError(f"{shards:,} shards are too many for a manifest: raise shard_size")


@dataclass(frozen=True)
class PackPlan:
    """A packing that is ready to run: what there is, and what is done already."""

    folder: Path
    contents: Contents
    parts: Mapping[ShardTask, Part]
    finished: Mapping[str, ShardRecord]
    notes: tuple[str, ...]

    def missing(self) -> tuple[ShardTask, ...]:
        """The shards that are not finished."""
        return tuple(task for task in self.parts if task.name not in self.finished)


def plan_pack(folder: Path, source: Source, seed: int, shard_size: int) -> PackPlan:
    """List the images, look at the folder and find out what is to be done; nothing but leftovers is removed or written.

    Raises:
        FractalError: if the source is not as it should be, or the folder holds something else.
        OSError: if either cannot be read.
    """
    found = stored_recipe(folder)
    listing = source.list_images(folder)
    parts = listing.parts if source.val_share is None else deal(listing.parts["train"], source.val_share, seed)
    recipe = PackRecipe(
        kind=source.kind,
        n=len(parts["train"].labels),
        val=len(parts["val"].labels) if "val" in parts else 0,
        classes=listing.classes,
        seed=seed,
        shard_size=shard_size,
        val_share=None if source.val_share is None else float(source.val_share),
        files=listing.digest,
    )
    contents = _contents(recipe, listing)
    if found is not None:
        refuse_other(folder, found, contents.recipe)
        remove_leftovers(folder)
    tasks = _tasks(parts, recipe)
    return PackPlan(folder, contents, tasks, finished_shards(folder, tuple(tasks), contents), tuple(listing.notes))


def run_pack(plan: PackPlan, workers: int) -> None:
    """Write the missing shards, then the manifest unless it is there, with so many worker processes.

    Every image is decoded once; all others are still packed where some cannot be, so that all are named.

    Raises:
        FractalError: naming the images that cannot be packed; if a worker process was killed, shards vanished, or
            another build has claimed the folder since it was looked at.
        OSError: as the file system does; shards that are finished stay.
    """
    claim_folder(plan.folder, plan.contents.recipe)
    complaints: list[str] = []
    jobs = {
        task: partial(pack_shard, plan.folder, task, plan.parts[task], plan.contents.classes) for task in plan.missing()
    }
    with worker_pool(workers) as pool:
        for bad_images in run_jobs(jobs, pool, plan.folder, "packing") if jobs else ():
            complaints += bad_images
    if complaints:
        raise FractalError(_complain(sorted(complaints)))
    refuse_vanished(plan.folder, publish(plan.folder, tuple(plan.parts), plan.contents))


def pack_shard(folder: Path, task: ShardTask, part: Part, classes: int) -> tuple[str, ...]:
    """Write one shard; if images cannot be decoded, write nothing and say which, and why."""
    try:
        write_samples(folder, task.name, classes, _samples(task, part))
    except _BadImagesError as error:
        return error.complaints
    return ()


class _BadImagesError(FractalError):
    """Images of a shard cannot be packed."""

    def __init__(self, complaints: Iterable[str]) -> None:
        self.complaints = tuple(complaints)


def _samples(task: ShardTask, part: Part) -> Iterable[Encoded]:
    complaints = []
    for place, label in enumerate(part.labels.tolist()):
        try:
            encoded = encode_file(sample_key(task.first + place), part.images.read(place), label)
        except FractalError as error:
            complaints.append(f"{part.images.name(place)}: {error}")
        else:
            yield encoded
    if complaints:
        raise _BadImagesError(complaints)


def encode_file(key: str, data: bytes, label: int) -> Encoded:
    """The sample of an image file: its bytes as they are, or a PNG of its pixels if shards do not hold its format.

    Raises:
        FractalError: if it cannot be decoded, or the sample would be larger than readers take.
    """
    pixels = decode_image(data)
    extension = image_format(data)
    image = {extension: data} if extension else {PNG: encode_png(pixels)}
    name, text = encode_label(label)
    sample = Sample(key, {**image, name: text})
    check_size(sample)
    return Encoded(sample, pixels, label)


def _contents(recipe: PackRecipe, listing: ImageListing) -> Contents:
    return Contents(asdict(recipe), "single", recipe.classes, listing.class_names, listing.class_ids)


def _tasks(parts: Mapping[str, Part], recipe: PackRecipe) -> dict[ShardTask, Part]:
    """Every shard and its images: those of a split in a seeded order, which mixes the classes, cut into shards."""
    tasks = {}
    first = 0
    for split, part in parts.items():
        count = len(part.labels)
        mixed = part.take(shuffled(count, recipe.seed, split))
        for shard, begin in enumerate(range(0, count, recipe.shard_size)):
            stop = min(begin + recipe.shard_size, count)
            task = ShardTask(split, shard_name(split, shard), first + begin, first + stop)
            tasks[task] = mixed.take(np.arange(begin, stop))
        first += count
    return tasks


def _complain(complaints: list[str]) -> str:
    if len(complaints) == 1:
        return f"{complaints[0]}; {_ADVICE.format(them='it')}"
    named = "; ".join(complaints[:_NAMED])
    more = f"; and {len(complaints) - _NAMED:,} more" if len(complaints) > _NAMED else ""
    return f"{len(complaints):,} images cannot be packed: {named}{more}; {_ADVICE.format(them='them')}"
