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
from fractalgen.recipe import RECIPE_VERSION, Recipe
from fractalgen.render import render_range
from fractalshards.assemble import Contents, ShardTask, finished_shards, publish, refuse_vanished, run_jobs
from fractalshards.atomic import remove_leftovers
from fractalshards.digest import systems_digest
from fractalshards.errors import FractalError
from fractalshards.names import SYSTEMS
from fractalshards.slices import Slice
from fractalshards.systems import Systems, read_systems
from fractalshards.writer import write_shard


@dataclass(frozen=True)
class Plan:
    """A build that is ready to run.

    ``tasks`` are all shards of the dataset, ``own`` those of this build, and ``missing`` those of them to render now;
    ``cost`` is what that will take, None for nothing.
    """

    folder: Path
    recipe: Recipe
    systems: Systems
    tasks: tuple[ShardTask, ...]
    own: tuple[ShardTask, ...]
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
    own = part.of(tasks) if part else tasks
    missing = tuple(task for task in own if task.name not in finished)
    left = sum(task.stop - task.first for task in missing)
    cost = forecast(bound, systems, left, min(workers, len(missing))) if left else None
    if cost is not None:
        check_space(folder, cost)
    return Plan(folder, bound, systems, tasks, own, missing, cost)


def run_build(plan: Plan, executor: Executor) -> tuple[str, ...]:
    """Render what is missing, then finish the dataset; see ``render_missing`` and ``finish_dataset``."""
    render_missing(plan, executor)
    return finish_dataset(plan)


def render_missing(plan: Plan, executor: Executor) -> None:
    """Write the missing shards.

    Args:
        executor: of ``engines.open_engine``.

    Raises:
        FractalError: if workers died at some shards again and again (the others are rendered all the same), or
            another build has claimed the folder since it was looked at.
        OSError: as the file system does; shards that are finished stay.
    """
    claim(plan.folder, plan.recipe, plan.systems)
    folder = plan.folder.absolute()
    jobs = {task: partial(_finish_shard, folder, plan.recipe, task) for task in plan.missing}
    for _ in run_jobs(jobs, executor, plan.folder, "rendering") if jobs else ():
        pass  # what has been written, the sidecars tell


def finish_dataset(plan: Plan) -> tuple[str, ...]:
    """Assemble the manifest from the sidecars, if all shards of the dataset are there.

    Returns:
        The names of the shards that are missing because other slices have still to build them.

    Raises:
        FractalError: if shards of this build vanished.
        OSError: as the file system does.
    """
    missing = publish(plan.folder, plan.tasks, contents_of(plan.recipe))
    refuse_vanished(plan.folder, {task.name for task in plan.own}.intersection(missing))
    return missing


def build_shard(folder: Path, recipe: Recipe, systems: Systems, task: ShardTask) -> None:
    """Render and write one shard; a pure function of its arguments but for the files it writes."""
    samples = render_range(recipe, systems, task.first, task.stop)
    write_shard(folder, task.name, recipe.classes, samples, encode_image, pixels_of)


def _finish_shard(folder: Path, recipe: Recipe, task: ShardTask) -> None:
    """What a worker does, perhaps on another machine: build a shard, unless another build has done so by now."""
    host = socket.gethostname()
    if recipe.version != RECIPE_VERSION:  # a recipe that travelled is not checked when it is made again
        raise FractalError(
            f"{host}: this fractalpretrain renders recipe version {RECIPE_VERSION}, not {recipe.version}; install the "
            "same version everywhere"
        )
    if not folder.is_dir():
        raise FractalError(f"{folder}: not there on {host}; all workers need it under the same path")
    if not finished_shards(folder, (task,), contents_of(recipe)):
        build_shard(folder, recipe, _stored_systems(folder / SYSTEMS, recipe.systems_digest), task)


@lru_cache(maxsize=1)
def _stored_systems(path: Path, digest: str) -> Systems:
    """The systems of a folder, read once by each worker."""
    systems = read_systems(path)
    if systems_digest(systems) != digest:
        raise FractalError(f"{path}: not the systems of this build; run the same command again")
    return systems


def contents_of(recipe: Recipe) -> Contents:
    """What the manifest says of a recipe's dataset."""
    return Contents(recipe.to_json(), find_kind(recipe.kind).label_type, recipe.classes)
