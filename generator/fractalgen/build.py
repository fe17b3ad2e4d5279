"""Builds a dataset: recipe -> systems -> shard tasks -> an executor -> tars and sidecars -> manifest."""

import socket
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fractalgen.color import pixels_of
from fractalgen.deflate import encode_image
from fractalgen.engines import is_lost
from fractalgen.folder import claim, settle
from fractalgen.forecast import Forecast, check_space, forecast
from fractalgen.kinds import find_kind
from fractalgen.plan import ShardTask, shard_tasks
from fractalgen.recipe import Recipe
from fractalgen.render import render_range
from fractalgen.slices import Slice
from fractalshards.atomic import remove_leftovers
from fractalshards.console import progress
from fractalshards.digest import mapping_digest
from fractalshards.errors import FractalError
from fractalshards.human import human_count, human_list
from fractalshards.manifest import Shard, finished_record, load_manifest, write_manifest
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
    missing = tuple(task for task in (part.of(tasks) if part else tasks) if _finished(folder, bound, task) is None)
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
    _render(plan, executor)
    shards = {task.name: _finished(plan.folder, plan.recipe, task) for task in plan.tasks}
    missing = tuple(name for name, shard in shards.items() if shard is None)
    if vanished := {task.name for task in plan.missing}.intersection(missing):
        raise FractalError(
            f"{plan.folder}: {human_list(sorted(vanished))} vanished after being written; check the disk or the "
            "network file system, then run the same command again"
        )
    if not missing:
        _assemble(plan, {name: shard for name, shard in shards.items() if shard is not None})
    remove_leftovers(plan.folder)
    return missing


def build_shard(folder: Path, recipe: Recipe, systems: Systems, task: ShardTask) -> None:
    """Render and write one shard; a pure function of its arguments but for the files it writes."""
    samples = render_range(recipe, systems, task.first, task.stop)
    write_shard(folder, task.name, recipe.classes, samples, encode_image, pixels_of)


def _finish_shard(folder: Path, recipe: Recipe, task: ShardTask) -> None:
    """What a worker does, perhaps on another machine: build a shard, unless another build has done so by now."""
    if not folder.is_dir():
        raise FractalError(f"{folder}: not there on {socket.gethostname()}; all workers need it under the same path")
    if _finished(folder, recipe, task) is None:
        build_shard(folder, recipe, _stored_systems(folder / SYSTEMS, recipe.systems_digest), task)


@lru_cache(maxsize=1)
def _stored_systems(path: Path, digest: str) -> Systems:
    """The systems of a folder, read once by each worker; the digest tells those of one build from another's."""
    return read_systems(path)


def _render(plan: Plan, executor: Executor) -> None:
    lost: dict[str, BaseException] = {}
    samples = sum(task.stop - task.first for task in plan.missing)
    folder = plan.folder.absolute()
    with progress("rendering", samples, "images") as advance:
        futures = {executor.submit(_finish_shard, folder, plan.recipe, task): task for task in plan.missing}
        for future in as_completed(futures):
            task = futures[future]
            try:
                future.result()
            except Exception as error:
                if not is_lost(error):
                    raise
                lost[task.name] = error
            advance(task.stop - task.first)
    if lost:
        reason = str(next(iter(lost.values()))) or "out of memory"
        raise FractalError(
            f"{plan.folder}: {human_count(len(lost), 'shard')} missing, {human_list(sorted(lost))}: {reason}; lower "
            "--workers and run the same command again"
        )


def _assemble(plan: Plan, shards: dict[str, Shard]) -> None:
    """Write the manifest, unless it is there."""
    names = dict.fromkeys(task.split for task in plan.tasks)
    splits = {name: tuple(shards[task.name] for task in plan.tasks if task.split == name) for name in names}
    if not _listed(plan, splits):
        write_manifest(
            plan.folder,
            splits,
            recipe=plan.recipe.to_json(),
            recipe_digest=plan.recipe.digest(),
            label_type=find_kind(plan.recipe.kind).label_type,
            classes=plan.recipe.classes,
            image_size=plan.recipe.size,
        )


def _finished(folder: Path, recipe: Recipe, task: ShardTask) -> Shard | None:
    """The shard of a task if it is whole and what the task would write, else None."""
    record = finished_record(folder, task.name, find_kind(recipe.kind).label_type)
    fits = record and record.samples == task.stop - task.first and len(record.label_counts) == recipe.classes
    return record.shard() if record and fits else None


def _listed(plan: Plan, splits: dict[str, tuple[Shard, ...]]) -> bool:
    """Whether there is a manifest of this recipe that lists just these shards."""
    try:
        manifest = load_manifest(plan.folder)
    except FractalError:
        return False
    recipe_fits = manifest.recipe_digest == mapping_digest(manifest.recipe) == plan.recipe.digest()
    return recipe_fits and manifest.splits == splits
