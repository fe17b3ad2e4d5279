"""Write shards, each with its sidecar, in worker processes, then the manifest that lists them."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fractalshards.digest import ContentDigest, mapping_digest
from fractalshards.errors import FractalError
from fractalshards.human import human_count, human_list
from fractalshards.manifest import (
    MAX_SAMPLE_BYTES,
    DatasetInfo,
    ShardRecord,
    load_manifest,
    read_record,
    write_manifest,
    write_record,
)
from fractalshards.png import Indexed, Pixels, encode_png, pixels_of
from fractalshards.sample import END_OF_TAR, PNG, Label, Sample, classes_of, encode_label, pack_sample, packed_size
from fractalshards.storage import atomic_file, regular_size, remove_leftovers
from fractalshards.workers import OnProgress, as_finished, is_lost, no_progress

Rendered = tuple[Pixels | Indexed, Label]  # an image, (H, W, 3) uint8 or indexed, and its label
Encode = Callable[[Pixels | Indexed], bytes]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Encoded:
    """A sample as a shard stores it, not too large for readers, with its pixels, (H, W, 3) uint8, and label."""

    sample: Sample
    pixels: Pixels
    label: Label

    def __post_init__(self) -> None:
        if (size := packed_size(self.sample)) > MAX_SAMPLE_BYTES:
            raise FractalError(f"a sample of {size:,} bytes is larger than {MAX_SAMPLE_BYTES >> 20} MiB")


def encode_rendered(key: str, rendered: Rendered, encode: Encode = encode_png) -> Encoded:
    """Make a sample of a rendered image: its PNG, then its label."""
    image, label = rendered
    extension, text = encode_label(label)
    return Encoded(Sample(key, {PNG: encode(image), extension: text}), pixels_of(image), label)


def write_shard(
    folder: Path, name: str, classes: int, samples: Iterable[tuple[str, Rendered]], encode: Encode = encode_png
) -> ShardRecord:
    """Write ``folder/name`` and its sidecar from (key, (image, label)) samples; see ``write_samples``.

    ``encode`` turns an image into a PNG that decodes to the same pixels.
    """
    return write_samples(folder, name, classes, (encode_rendered(key, image, encode) for key, image in samples))


def write_samples(folder: Path, name: str, classes: int, samples: Iterable[Encoded]) -> ShardRecord:
    """Write ``folder/name`` and its sidecar from encoded samples.

    Samples are streamed, so memory does not grow with their number; their labels are in [0, classes). After an error no
    sidecar is written, so the shard does not count as finished.
    """
    sha256 = hashlib.sha256()
    content = ContentDigest()
    counts = [0] * classes
    offsets = [0]
    sides: set[int] = set()
    with atomic_file(folder / name) as file:
        for encoded in samples:
            blocks = pack_sample(encoded.sample)
            file.write(blocks)
            sha256.update(blocks)
            content.add(encoded.sample, encoded.pixels)
            for index in classes_of(encoded.label):
                counts[index] += 1
            offsets.append(offsets[-1] + len(blocks))
            sides.update(encoded.pixels.shape[:2])
        file.write(END_OF_TAR)
        sha256.update(END_OF_TAR)
    record = ShardRecord(
        name=name,
        samples=len(offsets) - 1,
        bytes=offsets[-1] + len(END_OF_TAR),
        sha256=sha256.hexdigest(),
        content_digest=content.hexdigest(),
        label_counts=tuple(counts),
        image_size=sides.pop() if len(sides) == 1 else None,
        offsets=tuple(offsets),
    )
    write_record(folder, record)
    return record


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: samples ``first`` to ``stop - 1`` of the dataset."""

    split: str
    name: str
    first: int
    stop: int


def finished_shards(folder: Path, tasks: Sequence[ShardTask], info: DatasetInfo) -> dict[str, ShardRecord]:
    """Read the records of the finished shards, by name.

    A finished shard has a valid sidecar, a tar of the right size, and the samples and classes of its task.
    """
    found = {}
    for task in tasks:
        with suppress(FractalError, OSError):
            record = read_record(folder, task.name, info.label_type)
            fitting = (record.samples, len(record.label_counts)) == (task.stop - task.first, info.classes)
            if fitting and regular_size(folder / task.name) == record.bytes:
                found[task.name] = record
    return found


def run_jobs(
    jobs: Mapping[ShardTask, Callable[[], _T]], executor: Executor, folder: Path, on_progress: OnProgress = no_progress
) -> list[_T]:
    """Run picklable jobs, by the shard that each writes; return their results in the order in which they finish.

    An error in one job stops the others; finished shards stay. A shard whose worker is killed three times is left out,
    all others are still written, and a FractalError names it, and the ``folder``, at the end. ``on_progress`` is called
    with the samples of finished jobs and of all jobs.
    """
    lost: dict[str, str] = {}
    results = []
    done, total = 0, sum(task.stop - task.first for task in jobs)
    futures = {executor.submit(job): task for task, job in jobs.items()}
    for future in as_finished(futures):
        task = futures[future]
        try:
            results.append(future.result())
        except Exception as error:  # whatever the job raised
            if not is_lost(error):
                raise
            ran_out = isinstance(error, MemoryError)
            lost[task.name] = "memory ran out, lower --workers" if ran_out else str(error) or type(error).__name__
            continue
        done += task.stop - task.first
        on_progress(done, total)
    if lost:
        missing = f"{human_count(len(lost), 'shard')} missing, {human_list(sorted(lost))}"
        raise FractalError(f"{folder}: {missing}: {next(iter(lost.values()))}; run the same command again")
    return results


def publish(folder: Path, tasks: Sequence[ShardTask], own: Iterable[ShardTask], info: DatasetInfo) -> tuple[str, ...]:
    """Write the manifest from the sidecars once all shards are finished, and remove leftovers of killed builds.

    Returns the names of the shards in ``tasks`` that are missing. Raises FractalError if one in ``own``, which the
    caller has written or found finished, has vanished.
    """
    records = finished_shards(folder, tasks, info)
    if vanished := sorted(task.name for task in own if task.name not in records):
        raise FractalError(f"{folder}: {human_list(vanished)} vanished; check the disk and run the same command again")
    remove_leftovers(folder)
    if missing := tuple(task.name for task in tasks if task.name not in records):
        return missing
    names = dict.fromkeys(task.split for task in tasks)
    splits = {name: tuple(records[task.name].shard() for task in tasks if task.split == name) for name in names}
    with suppress(FractalError):
        found = load_manifest(folder)
        if (found.splits, found.recipe, found.recipe_digest) == (splits, info.recipe, mapping_digest(info.recipe)):
            return ()
    sides = {record.image_size for record in records.values()}
    write_manifest(folder, splits, info, sides.pop() if len(sides) == 1 else None)
    return ()
