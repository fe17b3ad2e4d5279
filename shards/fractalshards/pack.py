"""Pack existing images into shards: hold out a share, shuffle, and write every image file as one sample."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import xxhash

from fractalshards.errors import FractalError, UsageError
from fractalshards.human import human_count, human_list
from fractalshards.image_files import ImageFiles, ImageListing, has_splits, list_folder, list_ilsvrc, parse_place
from fractalshards.manifest import MAX_SAMPLES, MAX_SHARDS, DatasetInfo, sample_key, shard_name
from fractalshards.png import decode_image, encode_png
from fractalshards.random import permutation
from fractalshards.recipe_file import claim_folder, refuse_other, stored_recipe
from fractalshards.sample import PNG, Sample, encode_label, image_format
from fractalshards.storage import remove_leftovers
from fractalshards.workers import OnProgress, no_progress, worker_pool
from fractalshards.writer import Encoded, ShardTask, finished_shards, publish, run_jobs, write_samples

RECIPE_VERSION = 1  # raised when the same files would become another dataset
_NUMBER = re.compile(r"\d*\.?\d+", re.ASCII)
_MAX_NAMED = 10  # bad images in an error
_CHECKED = 256  # images per task

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageSource:
    """Where the images to pack come from; at most one of ``val_share`` and ``folders`` is given."""

    kind: str  # ``imagefolder`` or ``imagenet``
    path: Path
    val_share: Fraction | None = None  # share of each class to hold out as split ``val``
    folders: Mapping[str, str] | None = None  # folder below ``path`` for each split

    def list_images(self, out: Path) -> ImageListing:
        """List all images, before a share is held out; raises FractalError if the source is incomplete or malformed.

        ``out``, the folder of the shards, must not be inside the image folder, where it would look like a class.
        """
        stored_recipe(out)
        if not self.path.is_dir():
            raise FractalError(f"{self.path}: no such folder; give the folder that contains the images")
        if self.kind == "imagenet":
            return list_ilsvrc(self.path, with_val=self.val_share is None)
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(self.path)):
            raise FractalError(f"{out}: inside the image folder {self.path}; choose a folder outside of it")
        if self.val_share is not None and has_splits(self.path):
            raise UsageError(
                f"--split: {self.path} already has splits; give the path of its train folder, or no --split"
            )
        return list_folder(self.path, self.folders)


def parse_source(text: str, split: str | None) -> ImageSource:
    """Parse ``KIND:PATH`` and the value of ``--split``, ``train=X,val=Y`` with shares or folders."""
    if (place := parse_place(text, ("imagefolder", "imagenet"))) is None:
        raise UsageError(f"{text!r}: expected imagefolder:PATH or imagenet:PATH")
    kind, path = place
    if split is None:
        return ImageSource(kind, path)
    pairs = [part.strip().partition("=")[::2] for part in split.split(",")]
    values = dict(pairs)
    shares = [Fraction(value) for value in values.values() if _NUMBER.fullmatch(value)]
    are_splits = len(values) == len(pairs) and {"train"} <= values.keys() <= {"train", "val"} and all(values.values())
    if are_splits and not shares and kind == "imagefolder":
        return ImageSource(kind, path, folders={name: values[name] for name in ("train", "val") if name in values})
    if not are_splits or len(shares) != 2 or sum(shares) != 1 or not all(shares):
        raise UsageError(
            f"--split {split}: give shares above 0 that add up to 1, as train=0.9,val=0.1, or folders of an image "
            "folder, as train=DIR,val=DIR; write a folder whose name is a number as ./2012"
        )
    return ImageSource(kind, path, val_share=Fraction(values["val"]))


@dataclass(frozen=True)
class PackPlan:
    """The shards to write into a folder, and the images of those that are missing."""

    folder: Path
    info: DatasetInfo
    shards: tuple[ShardTask, ...]
    missing: Mapping[ShardTask, ImageFiles]


def leave_out_bad(listing: ImageListing, workers: int, on_progress: OnProgress = no_progress) -> ImageListing:
    """Decode all images with ``workers`` processes, leave out the bad ones, and log them.

    Packing the rest gives the same dataset as a source without the bad images.
    """
    chunks = [
        (split, first, images.take(np.arange(first, min(first + _CHECKED, len(images.names)))))
        for split, images in listing.splits.items()
        for first in range(0, len(images.names), _CHECKED)
    ]
    done, total = 0, sum(len(images.names) for _, _, images in chunks)
    bad: dict[str, list[int]] = {split: [] for split in listing.splits}
    with worker_pool(workers) as pool:
        found = pool.map(_find_bad, [images for _, _, images in chunks])
        for (split, first, images), complaints in zip(chunks, found, strict=True):
            for position, complaint in complaints:
                _log.warning("skipped: %s", complaint)
                bad[split].append(first + position)
            done += len(images.names)
            on_progress(done, total)
    if count := sum(map(len, bad.values())):
        _log.warning("skipped %s of %s", human_count(count, "bad image"), human_count(total, "image"))
    return listing.without(bad)


def _find_bad(images: ImageFiles) -> list[tuple[int, str]]:
    """Return the positions of bad images, and what is wrong with them."""
    samples = ((position, _encode(images, position, sample_key(0))) for position in range(len(images.names)))
    return [(position, sample) for position, sample in samples if isinstance(sample, str)]


def plan_pack(folder: Path, source: ImageSource, listing: ImageListing, seed: int, shard_size: int) -> PackPlan:
    """Cut a dataset into shards, and check which are finished; removes leftovers of killed builds, writes nothing."""
    found = stored_recipe(folder)
    splits = listing.splits if source.val_share is None else hold_out(listing.splits["train"], source.val_share, seed)
    counts = {split: len(images.labels) for split, images in splits.items()}
    if (total := sum(counts.values())) > MAX_SAMPLES:
        raise UsageError(f"{total:,} images are more than {MAX_SAMPLES:,}: pack several datasets")
    if total // shard_size > MAX_SHARDS:
        raise UsageError(f"{total // shard_size:,} shards are more than {MAX_SHARDS:,}: raise --shard-size")
    recipe = {  # equal recipes of files with equal bytes give equal samples
        "kind": source.kind,
        "n": counts["train"],
        "val": counts.get("val", 0),
        "classes": listing.classes,
        "seed": seed,
        "shard_size": shard_size,
        "val_share": None if source.val_share is None else float(source.val_share),
        "files": listing.digest(),
        "version": RECIPE_VERSION,
    }
    info = DatasetInfo(recipe, "single", listing.classes, listing.class_names, listing.class_ids)
    if found is not None:
        refuse_other(folder, found, recipe)
        remove_leftovers(folder)
    shards = {}
    first = 0
    for split, images in splits.items():
        order = permutation(counts[split], _key(split, seed))  # which mixes the classes
        for shard, begin in enumerate(range(0, counts[split], shard_size)):
            part = images.take(order[begin : begin + shard_size])
            task = ShardTask(split, shard_name(split, shard), first + begin, first + begin + len(part.names))
            shards[task] = part
        first += counts[split]
    finished = finished_shards(folder, tuple(shards), info)
    missing = {task: images for task, images in shards.items() if task.name not in finished}
    return PackPlan(folder, info, tuple(shards), missing)


def hold_out(images: ImageFiles, share: Fraction, seed: int) -> Mapping[str, ImageFiles]:
    """Split images into ``train`` and ``val``: ``share`` of each class, rounded, goes to val, but never all of it."""
    order = permutation(len(images.labels), _key("deal", seed))
    order = order[np.argsort(images.labels[order], kind="stable")]  # class after class, each shuffled
    counts = np.bincount(images.labels)
    is_val = np.zeros(len(order), bool)
    for first, count in zip(np.cumsum(counts) - counts, counts.tolist(), strict=True):
        is_val[first : first + min(int(count * share + Fraction(1, 2)), count - 1)] = True
    if not is_val.any():
        raise FractalError(f"--split: a share of {float(share)} is less than one image of any class; raise it")
    return {"train": images.take(np.sort(order[~is_val])), "val": images.take(np.sort(order[is_val]))}


def _key(purpose: str, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(f"{purpose} {seed}".encode())


def run_pack(plan: PackPlan, workers: int, on_progress: OnProgress = no_progress) -> None:
    """Write the missing shards with ``workers`` processes, then the manifest; every image is decoded once.

    If some images are bad, the shards without any are still written, and a FractalError names all bad images.
    """
    claim_folder(plan.folder, plan.info.recipe)
    pack = partial(pack_shard, plan.folder, plan.info.classes)
    jobs = {task: partial(pack, task, images) for task, images in plan.missing.items()}
    with worker_pool(workers) as pool:
        complaints = sorted(chain.from_iterable(run_jobs(jobs, pool, plan.folder, on_progress)))
    if complaints:
        raise FractalError(
            f"{human_count(len(complaints), 'bad image')}: {human_list(complaints, _MAX_NAMED)}; "
            "replace them and run the same command again, or pack into a new folder with --on-bad-image skip"
        )
    publish(plan.folder, plan.shards, plan.shards, plan.info)


class _BadImagesError(Exception):
    """Abandons a shard that has bad images."""


def pack_shard(folder: Path, classes: int, task: ShardTask, images: ImageFiles) -> list[str]:
    """Write one shard, or nothing if an image is bad; returns what is wrong with each bad image."""
    complaints = []

    def samples() -> Iterator[Encoded]:
        for position in range(len(images.names)):
            sample = _encode(images, position, sample_key(task.first + position))
            if isinstance(sample, str):
                complaints.append(sample)
            else:
                yield sample
        if complaints:
            raise _BadImagesError

    with suppress(_BadImagesError):
        write_samples(folder, task.name, classes, samples())
    return complaints


def _encode(images: ImageFiles, position: int, key: str) -> Encoded | str:
    """Make a sample of an image: its file if shards store the format, else a PNG; or say what is wrong with it."""
    try:
        data = images.read(position)
        pixels = decode_image(data)
        extension = image_format(data)
        image = {extension: data} if extension else {PNG: encode_png(pixels)}
        label = int(images.labels[position])
        name, text = encode_label(label)
        return Encoded(Sample(key, {**image, name: text}), pixels, label)
    except FractalError as error:
        return f"{images.location(position)}: {error}"
