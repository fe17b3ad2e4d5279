"""Builds a dataset: recipe -> systems -> shard tasks -> worker processes -> tars and sidecars -> manifest."""

from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

from fractalgen.color import pixels_of
from fractalgen.deflate import encode_image
from fractalgen.folder import claim, settle
from fractalgen.forecast import Forecast, check_space, forecast
from fractalgen.kinds import find_kind
from fractalgen.plan import ShardTask, shard_tasks
from fractalgen.recipe import Recipe
from fractalgen.render import render_range
from fractalshards.atomic import remove_leftovers
from fractalshards.console import progress
from fractalshards.errors import FractalError
from fractalshards.manifest import Shard, finished_record, load_manifest, write_manifest
from fractalshards.systems import Systems
from fractalshards.workers import worker_pool
from fractalshards.writer import write_shard


@dataclass(frozen=True)
class Plan:
    """A build that is ready to run: what is done already, what is left, and what that will cost."""

    folder: Path
    recipe: Recipe
    systems: Systems
    tasks: tuple[ShardTask, ...]
    finished: dict[str, Shard]
    cost: Forecast | None

    def missing(self) -> tuple[ShardTask, ...]:
        """The shards that are not finished."""
        return tuple(task for task in self.tasks if task.name not in self.finished)


def plan_build(folder: Path, recipe: Recipe, workers: int, systems: Systems | None = None) -> Plan:
    """Look at the folder and find out what is to be done; leftovers of killed builds are removed, nothing is written.

    Args:
        systems: to render instead of those that the recipe's kind draws.

    Raises:
        FractalError: if the folder holds something else, or the disk cannot hold the dataset.
        OSError: if the folder cannot be read.
    """
    bound, systems = settle(folder, recipe, systems)
    if folder.exists():
        remove_leftovers(folder)
    tasks = shard_tasks(bound)
    shards = {task.name: _finished(folder, bound, task) for task in tasks}
    finished = {name: shard for name, shard in shards.items() if shard is not None}
    left = sum(task.stop - task.first for task in tasks if task.name not in finished)
    cost = forecast(bound, systems, left, workers) if left else None
    if cost is not None:
        check_space(folder, cost)
    return Plan(folder, bound, systems, tasks, finished, cost)


def run_build(plan: Plan, workers: int) -> None:
    """Write the missing shards, then the manifest unless it is there, and remove what killed builds left behind.

    Raises:
        FractalError: if a worker process was killed, or another build has claimed the folder since it was looked at.
        OSError: as the file system does; shards that are finished stay.
    """
    claim(plan.folder, plan.recipe, plan.systems)
    missing = plan.missing()
    shards = {**plan.finished, **(_write_shards(plan, missing, workers) if missing else {})}
    names = dict.fromkeys(task.split for task in plan.tasks)
    splits = {name: tuple(shards[task.name] for task in plan.tasks if task.split == name) for name in names}
    if missing or not _listed(plan.folder, splits):
        write_manifest(
            plan.folder,
            splits,
            recipe=plan.recipe.to_json(),
            recipe_digest=plan.recipe.digest(),
            label_type=find_kind(plan.recipe.kind).label_type,
            classes=plan.recipe.classes,
            image_size=plan.recipe.size,
        )
    remove_leftovers(plan.folder)


def build_shard(folder: Path, recipe: Recipe, systems: Systems, task: ShardTask) -> Shard:
    """Render and write one shard; a pure function of its arguments but for the files it writes."""
    samples = render_range(recipe, systems, task.first, task.stop)
    return write_shard(folder, task.name, recipe.classes, samples, encode_image, pixels_of).shard()


def _write_shards(plan: Plan, missing: tuple[ShardTask, ...], workers: int) -> dict[str, Shard]:
    written: dict[str, Shard] = {}
    samples = sum(task.stop - task.first for task in missing)
    with progress("rendering", samples, "images") as advance, worker_pool(min(workers, len(missing))) as pool:
        futures = [pool.submit(build_shard, plan.folder, plan.recipe, plan.systems, task) for task in missing]
        for future in as_completed(futures):
            shard = future.result()
            written[shard.name] = shard
            advance(shard.samples)
    return written


def _finished(folder: Path, recipe: Recipe, task: ShardTask) -> Shard | None:
    """The shard of a task if it is whole and what the task would write, else None."""
    record = finished_record(folder, task.name, find_kind(recipe.kind).label_type)
    fits = record and record.samples == task.stop - task.first and len(record.label_counts) == recipe.classes
    return record.shard() if record and fits else None


def _listed(folder: Path, splits: dict[str, tuple[Shard, ...]]) -> bool:
    """Whether there is a manifest that lists just these shards."""
    try:
        return load_manifest(folder).splits == splits
    except FractalError:
        return False
