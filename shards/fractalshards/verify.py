"""Verify a finished dataset: hashes, counts, names, every image and label."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from fractalshards.digest import ContentDigest, systems_digest
from fractalshards.errors import FractalError
from fractalshards.manifest import RECIPE, SYSTEMS, Manifest, Shard, ShardRecord, read_record, sample_key
from fractalshards.reader import decode_sample, read_blocks
from fractalshards.recipe_file import RecipeFile, recipe_problems
from fractalshards.sample import (
    END_OF_TAR,
    Label,
    LabelType,
    MultiLabel,
    Sample,
    classes_of,
    image_extension,
    image_format,
    parse_sample,
    shown_key,
)
from fractalshards.storage import read_json, regular_size
from fractalshards.systems import read_systems
from fractalshards.workers import OnProgress, as_finished, no_progress, worker_pool

_CHUNK = 1 << 20


@dataclass(frozen=True, order=True)
class Problem:
    """A defect of a dataset."""

    file: str  # its name
    key: str  # of the damaged sample; empty if the defect is not in one sample
    what: str  # the defect, in words

    def __str__(self) -> str:
        return f"{self.file}: {self.key + ': ' if self.key else ''}{self.what}"


@dataclass(frozen=True)
class Promise:
    """Properties that the manifest promises of every sample."""

    classes: int
    image_size: int | None
    label_type: LabelType


def verify_dataset(manifest: Manifest, workers: int, on_progress: OnProgress = no_progress) -> list[Problem]:
    """Verify every file of a dataset in worker processes; return all problems, ordered by file.

    ``on_progress`` is called with (done, total) samples.
    """
    splits, firsts = manifest.splits, manifest.first_samples
    shards = [pair for name in splits for pair in zip(splits[name], firsts[name], strict=True)]
    others = {path.name for path in manifest.folder.glob("[!.]*.tar")}  # but not temporary files
    others -= {shard.name for shard, _ in shards}
    problems = [*_verify_recipe(manifest), *(Problem(name, "", "not in the manifest; remove it") for name in others)]
    promise = Promise(manifest.classes, manifest.image_size, manifest.label_type)
    with worker_pool(workers) as pool:
        problems += verify_shards(pool, manifest.folder, shards, promise, on_progress)
    return sorted(problems)


def verify_shards(
    executor: Executor, folder: Path, shards: Sequence[tuple[Shard, int]], promise: Promise, on_progress: OnProgress
) -> Iterator[Problem]:
    """Verify shards, each given with the index of its first sample; yields problems as they are found."""
    tasks = {executor.submit(verify_shard, folder, shard, first, promise): shard for shard, first in shards}
    done, total = 0, sum(shard.samples for shard, _ in shards)
    for task in as_finished(tasks):
        yield from task.result()
        done += tasks[task].samples
        on_progress(done, total)


def repair_advice(manifest: Manifest) -> str:
    """Say what to do about problems."""
    if "systems_digest" in manifest.recipe:
        return "fetch the named files again, or render them again with 'fractalgen repair'"
    return "fetch the named files again, or remove each tar and its .json and run the same 'fractalshards pack' again"


def verify_shard(folder: Path, shard: Shard, first: int, promise: Promise) -> list[Problem]:
    """Verify one shard, whose first sample has index ``first``, against its sidecar and the manifest."""
    try:
        record = read_record(folder, shard.name, promise.label_type)
        problems = [
            Problem(shard.name, "", f"manifest and sidecar disagree on {name}")
            for name, listed in asdict(shard).items()
            if getattr(record, name) != listed
        ]
        size = regular_size(folder / shard.name)
        if size != shard.bytes:
            return [*problems, Problem(shard.name, "", f"{size} bytes instead of {shard.bytes}")]
        with (folder / shard.name).open("rb") as file:
            sha256 = hashlib.sha256()
            problems += _verify_samples(file, record, first, promise, sha256.update)
        if sha256.hexdigest() != shard.sha256:
            problems.append(Problem(shard.name, "", "sha256 differs: the file was changed"))
        return problems
    except (FractalError, OSError) as error:
        return [_problem(folder, shard.name, error)]


def _verify_samples(
    file: BinaryIO, record: ShardRecord, first: int, promise: Promise, on_read: Callable[[bytes], None]
) -> Iterator[Problem]:
    """Verify the samples of a shard in one pass; ``on_read`` is called with all bytes of the file in order."""
    content = ContentDigest()
    counts: Counter[int] = Counter()
    sound = True
    for index, (start, end) in enumerate(pairwise(record.offsets), first):
        on_read(blocks := read_blocks(file.fileno(), start, end))
        try:
            sample = parse_sample(blocks)
            image, label = decode_sample(sample, promise.classes)
            if sample.key != sample_key(index):
                raise FractalError(f"expected sample {sample_key(index)} here")
            _check_sample(sample, image.shape, label, promise)
            content.add(sample, image)
            counts.update(classes_of(label))
        except FractalError as error:
            sound = False
            yield Problem(record.name, shown_key(blocks) or f"byte {start}", str(error))
    file.seek(record.offsets[-1])
    if (end_of_tar := file.read(len(END_OF_TAR) + 1)) != END_OF_TAR:
        yield Problem(record.name, "", "the tar does not end after its last sample")
    on_read(end_of_tar)
    while rest := file.read(_CHUNK):
        on_read(rest)
    if sound and content.hexdigest() != record.content_digest:
        yield Problem(record.name, "", "content digest differs: the samples are not those that were built")
    if sound and tuple(counts[label] for label in range(promise.classes)) != record.label_counts:
        yield Problem(record.name, "", "the labels do not match the counts in the sidecar")


def _check_sample(sample: Sample, shape: tuple[int, ...], label: Label, promise: Promise) -> None:
    """Raise unless a sample, the shape of its image and its label are what format and manifest promise."""
    extension = image_extension(sample.files)
    if next(iter(sample.files)) != extension:
        raise FractalError(f"the label comes before the .{extension}")
    if (found := image_format(sample.files[extension])) != extension:  # the content digest depends on the name
        raise FractalError(f"its image is named .{extension} but is {f'a .{found}' if found else 'of another format'}")
    height, width, _ = shape
    if (side := promise.image_size) and (height, width) != (side, side):
        raise FractalError(f"{width} x {height} pixels, not {side} x {side}")
    if isinstance(label, MultiLabel) != (promise.label_type == "multi"):
        raise FractalError(f"not a label of type {promise.label_type!r}")
    for thing in label.objects if isinstance(label, MultiLabel) else ():
        x, y, box_width, box_height = thing.bbox
        if x + box_width > width or y + box_height > height:
            raise FractalError(f"bbox {list(thing.bbox)} exceeds the image of {width} x {height} pixels")


def _problem(folder: Path, file: str, error: FractalError | OSError) -> Problem:
    """Turn an error into a problem, without the file name that most messages begin with."""
    if isinstance(error, FileNotFoundError):
        return Problem(file, "", f"{Path(error.filename).name} is missing")
    text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return Problem(file, "", text.removeprefix(f"{folder}/").removeprefix(f"{file}: "))


def _verify_recipe(manifest: Manifest) -> Iterator[Problem]:
    try:
        stored = read_json(manifest.folder / RECIPE, RecipeFile)
        for what in recipe_problems(stored.recipe, stored.recipe_digest, manifest):
            yield Problem(RECIPE, "", what)
    except (FractalError, OSError) as error:
        yield _problem(manifest.folder, RECIPE, error)
    try:
        if "systems_digest" not in manifest.recipe:  # packed, not rendered
            if (manifest.folder / SYSTEMS).exists():
                yield Problem(SYSTEMS, "", "not in the recipe; remove it")
        elif systems_digest(read_systems(manifest.folder / SYSTEMS)) != manifest.recipe["systems_digest"]:
            yield Problem(SYSTEMS, "", "systems digest differs: the file was changed")
    except (FractalError, OSError) as error:
        yield _problem(manifest.folder, SYSTEMS, error)
