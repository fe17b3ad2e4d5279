"""Builds a dataset: recipe -> systems -> shard tasks -> worker processes -> tars and sidecars -> manifest."""

from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from fractalgen.folder import describe_folder, settle
from fractalgen.forecast import Forecast, check_space, forecast
from fractalgen.plan import ShardTask, shard_tasks
from fractalgen.recipe import Recipe
from fractalgen.render import render_range
from fractalshards.atomic import remove_leftovers
from fractalshards.console import progress
from fractalshards.errors import FractalError
from fractalshards.manifest import ShardRecord, finished_record, write_manifest
from fractalshards.png import encode_png
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
    finished: dict[str, ShardRecord]
    cost: Forecast | None

    def missing(self) -> tuple[ShardTask, ...]:
        """The shards that are not finished."""
        return tuple(task for task in self.tasks if task.name not in self.finished)


def plan_build(folder: Path, recipe: Recipe, workers: int) -> Plan:
    """Look at the folder and find out what is to be done; nothing is written.

    Raises:
        FractalError: if the folder holds something else, or the disk cannot hold the dataset.
        OSError: if the folder cannot be read.
    """
    bound, systems = settle(folder, recipe)
    tasks = shard_tasks(bound)
    records = {task.name: finished_record(folder, task.name) for task in tasks}
    finished = {name: record for name, record in records.items() if record is not None}
    left = sum(task.stop - task.first for task in tasks if task.name not in finished)
    cost = forecast(bound, systems, left, workers) if left else None
    if cost is not None:
        check_space(folder, cost)
    return Plan(folder, bound, systems, tasks, finished, cost)


def run_build(plan: Plan, workers: int) -> None:
    """Write the missing shards, then the manifest, and remove what killed builds left behind.

    Raises:
        FractalError: if a worker process was killed.
        OSError: as the file system does; shards that are finished stay.
    """
    describe_folder(plan.folder, plan.recipe, plan.systems)
    missing = plan.missing()
    written = _write_shards(plan, missing, workers) if missing else {}
    records = {**plan.finished, **written}
    splits: dict[str, list[ShardRecord]] = {}
    for task in plan.tasks:
        splits.setdefault(task.split, []).append(records[task.name])
    write_manifest(
        plan.folder,
        splits,
        recipe=plan.recipe.to_json(),
        recipe_digest=plan.recipe.digest(),
        classes=plan.recipe.classes,
        image_size=plan.recipe.size,
    )
    remove_leftovers(plan.folder)


def build_shard(folder: Path, recipe: Recipe, systems: Systems, task: ShardTask) -> ShardRecord:
    """Render and write one shard; a pure function of its arguments but for the file it writes."""
    samples = render_range(recipe, systems, task.first, task.stop)
    return write_shard(folder, task.name, recipe.classes, samples, encode_png)


def _write_shards(plan: Plan, missing: tuple[ShardTask, ...], workers: int) -> dict[str, ShardRecord]:
    written: dict[str, ShardRecord] = {}
    samples = sum(task.stop - task.first for task in missing)
    with worker_pool(min(workers, len(missing))) as pool, progress("rendering", samples, "images") as advance:
        tasks: dict[Future[ShardRecord], ShardTask] = {
            pool.submit(build_shard, plan.folder, plan.recipe, plan.systems, task): task for task in missing
        }
        try:
            for future in as_completed(tasks):
                record = future.result()
                written[record.name] = record
                advance(record.samples)
        except BrokenProcessPool as error:
            raise FractalError(
                f"{plan.folder}: a worker was killed, perhaps for lack of memory; finished shards are kept, "
                "run the same command to continue"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return written
