"""From shards to be written to a finished dataset: which are missing, worker processes, then the manifest (law 2)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fractalshards.atomic import remove_leftovers
from fractalshards.console import progress
from fractalshards.digest import mapping_digest
from fractalshards.errors import FractalError
from fractalshards.labels import LabelType
from fractalshards.manifest import ShardRecord, finished_record, load_manifest, write_manifest
from fractalshards.workers import worker_pool

_T = TypeVar("_T")


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: samples ``first`` to ``stop - 1`` of the dataset."""

    split: str
    name: str
    first: int
    stop: int


@dataclass(frozen=True)
class Contents:
    """What a dataset is, apart from its samples: the fields of its manifest that are known before it is written."""

    recipe: Mapping[str, Any]
    label_type: LabelType
    classes: int
    class_names: tuple[str, ...] = ()
    class_ids: tuple[str, ...] = ()


def finished_shards(folder: Path, tasks: Sequence[ShardTask], contents: Contents) -> dict[str, ShardRecord]:
    """The records, by name, of the shards that are whole and have the samples and classes of their tasks."""
    found = {task: finished_record(folder, task.name, contents.label_type) for task in tasks}
    return {
        task.name: record
        for task, record in found.items()
        if record and record.samples == task.stop - task.first and len(record.label_counts) == contents.classes
    }


def run_jobs(jobs: Mapping[ShardTask, Callable[[], _T]], workers: int, verb: str) -> Iterator[_T]:
    """Run what writes each shard in worker processes, with progress on stderr; results come as they are ready.

    Args:
        jobs: picklable calls, sent to a worker one by one.
        verb: what is done to the images, for the progress: ``rendering``.

    Raises:
        FractalError: if a worker process was killed.
        Exception: whatever a job raises; shards that are finished stay.
    """
    samples = sum(task.stop - task.first for task in jobs)
    with progress(verb, samples, "images") as advance, worker_pool(min(workers, len(jobs))) as pool:
        futures = {pool.submit(job): task for task, job in jobs.items()}
        for future in as_completed(futures):
            yield future.result()
            advance(futures[future].stop - futures[future].first)


def publish(folder: Path, tasks: Sequence[ShardTask], records: Mapping[str, ShardRecord], contents: Contents) -> None:
    """Write the manifest, unless it is there and lists just these shards, and remove what killed builds left behind.

    Raises:
        OSError: if it cannot be written.
    """
    names = dict.fromkeys(task.split for task in tasks)
    splits = {name: tuple(records[task.name].shard() for task in tasks if task.split == name) for name in names}
    sides = {record.image_size for record in records.values()}
    if not _listed(folder, splits):
        write_manifest(
            folder,
            splits,
            recipe=contents.recipe,
            recipe_digest=mapping_digest(contents.recipe),
            label_type=contents.label_type,
            classes=contents.classes,
            image_size=sides.pop() if len(sides) == 1 else None,
            class_names=contents.class_names,
            class_ids=contents.class_ids,
        )
    remove_leftovers(folder)


def _listed(folder: Path, splits: Mapping[str, object]) -> bool:
    try:
        return load_manifest(folder).splits == splits
    except FractalError:
        return False
