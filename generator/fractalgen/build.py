"""Builds a dataset: recipe -> systems -> shard tasks -> an executor -> tars and sidecars -> manifest."""

import socket
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from fractalgen.color import pixels_of
from fractalgen.deflate import encode_image
from fractalgen.folder import claim, settle
from fractalgen.forecast import Forecast, check_space, forecast
from fractalgen.kinds import find_kind
from fractalgen.plan import shard_tasks
from fractalgen.recipe import Recipe
from fractalgen.render import render_range
from fractalgen.slices import Slice
from fractalshards.assemble import Contents, ShardTask, finished_shards, publish, run_jobs
from fractalshards.atomic import remove_leftovers
from fractalshards.errors import FractalError
from fractalshards.human import human_list
from fractalshards.names import SYSTEMS
from fractalshards.systems import Systems, read_systems
from fractalshards.writer import write_shard


@dataclass(frozen=True)
class Plan:
    """A build that is ready to run: all shards, those to render now, and what that will cost (None for nothing)."""

    folder: Path
    recipe: Recipe
    systems: Systems
    tasks: tuple[ShardTask, ...]
    missing: tuple[ShardTask, ...]
    cost: Forecast | None


def plan_build(
    folder: Path, recipe: Recipe, workers: int, systems: Systems | None = None, part: Slice | None = None
) -> Plan:
    """Look at the folder and find out what is to be done; leftovers of killed builds are removed, nothing is written.

    Args:
        systems: to render instead of those that the recipe's kind draws.
        part: the shards to render, if not all.

    Raises:
        FractalError: if the folder holds something else, or the disk cannot hold the dataset.
        OSError: if the folder cannot be read.
    """
    bound, systems = settle(folder, recipe, systems)
    if folder.exists():
        remove_leftovers(folder)
    tasks = shard_tasks(bound)
    finished = finished_shards(folder, tasks, contents_of(bound))
    missing = tuple(task for task in (part.of(tasks) if part else tasks) if task.name not in finished)
    left = sum(task.stop - task.first for task in missing)
    cost = forecast(bound, systems, left, min(workers, len(missing))) if left else None
    if cost is not None:
        check_space(folder, cost)
    return Plan(folder, bound, systems, tasks, missing, cost)


def run_build(plan: Plan, executor: Executor) -> tuple[str, ...]:
    """Render what the plan says; when the last shard of the dataset is there, assemble the manifest from the sidecars.

    Args:
        executor: of ``engines.open_engine``.

    Returns:
        The names of the shards that are missing because they are not in the plan, but in other slices.

    Raises:
        FractalError: if workers died at some shards again and again (the others are rendered all the same), shards
            vanished, or another build has claimed the folder since it was looked at.
        OSError: as the file system does; shards that are finished stay.
    """
    claim(plan.folder, plan.recipe, plan.systems)
    folder = plan.folder.absolute()
    jobs = {task: partial(_finish_shard, folder, plan.recipe, task) for task in plan.missing}
    for _ in run_jobs(jobs, executor, plan.folder, "rendering") if jobs else ():
        pass  # what has been written, the sidecars tell
    missing = publish(plan.folder, plan.tasks, contents_of(plan.recipe))
    if vanished := {task.name for task in plan.missing}.intersection(missing):
        raise FractalError(
            f"{plan.folder}: {human_list(sorted(vanished))} vanished after being written; check the disk or the "
            "network file system, then run the same command again"
        )
    return missing


def build_shard(folder: Path, recipe: Recipe, systems: Systems, task: ShardTask) -> None:
    """Render and write one shard; a pure function of its arguments but for the files it writes."""
    samples = render_range(recipe, systems, task.first, task.stop)
    write_shard(folder, task.name, recipe.classes, samples, encode_image, pixels_of)


def _finish_shard(folder: Path, recipe: Recipe, task: ShardTask) -> None:
    """What a worker does, perhaps on another machine: build a shard, unless another build has done so by now."""
    if not folder.is_dir():
        raise FractalError(f"{folder}: not there on {socket.gethostname()}; all workers need it under the same path")
    if not finished_shards(folder, (task,), contents_of(recipe)):
        build_shard(folder, recipe, _stored_systems(folder / SYSTEMS, recipe.systems_digest), task)


@lru_cache(maxsize=1)
def _stored_systems(path: Path, digest: str) -> Systems:
    """The systems of a folder, read once by each worker; the digest tells those of one build from another's."""
    return read_systems(path)


def contents_of(recipe: Recipe) -> Contents:
    """What the manifest says of a recipe's dataset."""
    return Contents(recipe.to_json(), find_kind(recipe.kind).label_type, recipe.classes)
