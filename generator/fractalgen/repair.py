"""Repairs a dataset: verifies every shard, then builds what is damaged or missing again.

A damaged shard loses its sidecar, which makes it unfinished; the rest is an ordinary build. So a repair that is
killed is continued by the same command, or by ``fractalgen build``.
"""

from dataclasses import dataclass
from pathlib import Path

from fractalgen.build import Plan, contents_of, finish_dataset, plan_build, render_missing, restore
from fractalgen.executors import Engine
from fractalgen.kinds import find_kind
from fractalgen.plan import shard_tasks
from fractalgen.recipe import Recipe
from fractalshards.console import progress
from fractalshards.errors import FractalError
from fractalshards.human import human_list
from fractalshards.manifest import INFO, Shard, load_manifest, sidecar_name
from fractalshards.verify import Problem, Promise, verify_shards
from fractalshards.writer import finished_shards


@dataclass(frozen=True)
class Repaired:
    """What was wrong with a dataset; by name, the shards rendered again, and tars that are none of its shards."""

    problems: tuple[Problem, ...]
    rendered: tuple[str, ...]
    strangers: tuple[str, ...]


def repair_dataset(folder: Path, engine: Engine) -> Repaired:
    """Verify a dataset, render again what is damaged or missing, and revise the manifest.

    The result has the content digests of an undisturbed build.

    Raises:
        FractalError: if nothing sound says what to build, or shards come out with other contents than the manifest
            promised, so that it or this software is wrong: then the manifest stays as it is; else as ``run_build``.
        OSError: as the file system does.
    """
    recipe, systems = restore(folder)
    promised = _promised(folder)
    if promised and not {task.name for task in shard_tasks(recipe)} <= promised.keys():
        raise FractalError(
            f"{folder}: holds a part of a dataset; fetch damaged shards again with 'fractalshards pull', or render the "
            "rest with 'fractalgen build'"
        )
    problems = _find_damage(folder, recipe, promised, engine)
    for name in {problem.file for problem in problems}:
        (folder / sidecar_name(name)).unlink(missing_ok=True)
    plan = plan_build(folder, recipe, engine.workers, systems)
    render_missing(plan, engine.executor)
    _check_promise(plan, promised)
    finish_dataset(plan)
    names = {task.name for task in plan.tasks}
    strangers = (path.name for path in folder.glob("[!.]*.tar") if path.name not in names)
    return Repaired(tuple(problems), tuple(task.name for task in plan.missing), tuple(sorted(strangers)))


def _promised(folder: Path) -> dict[str, Shard]:
    """The shards that the manifest lists, by name; none where there is no sound manifest."""
    try:
        return {shard.name: shard for shards in load_manifest(folder).splits.values() for shard in shards}
    except FractalError:
        return {}


def _find_damage(folder: Path, recipe: Recipe, promised: dict[str, Shard], engine: Engine) -> list[Problem]:
    """What is wrong with the shards that look finished."""
    promise = Promise(recipe.classes, recipe.size, find_kind(recipe.kind).label_type)
    tasks = shard_tasks(recipe)
    records = finished_shards(folder, tasks, contents_of(recipe))
    present = [task for task in tasks if task.name in records]
    shards = [(promised.get(task.name, records[task.name].shard()), task.first) for task in present]
    with progress("verifying", "images") as on_progress:
        return sorted(verify_shards(engine.executor, folder.absolute(), shards, promise, on_progress))


def _check_promise(plan: Plan, promised: dict[str, Shard]) -> None:
    """Refuse shards that were rendered again and differ from what the manifest says of them."""
    rendered = finished_shards(plan.folder, plan.missing, contents_of(plan.recipe))
    both = [name for name in rendered if name in promised]
    if other := [name for name in both if promised[name].content_digest != rendered[name].content_digest]:
        raise FractalError(
            f"{plan.folder}: rendered again, {human_list(other)} differ from what {INFO} promised: it was damaged, or "
            f"this software renders other pixels; compare with another copy, or remove {INFO} to believe the renders"
        )
