"""Repairs a dataset: verifies every shard, then builds what is damaged or missing again.

A damaged shard loses its sidecar, which makes it unfinished (law 2); the rest is an ordinary build. So a repair that is
killed is continued by the same command, or by ``fractalgen build``.
"""

from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path

from fractalgen.build import contents_of, plan_build, run_build
from fractalgen.engines import Engine
from fractalgen.folder import restore
from fractalgen.kinds import find_kind
from fractalgen.plan import shard_tasks
from fractalgen.recipe import Recipe
from fractalshards.assemble import finished_shards
from fractalshards.console import progress
from fractalshards.errors import FractalError
from fractalshards.human import human_list
from fractalshards.manifest import Manifest, Shard, load_manifest
from fractalshards.names import sidecar_name
from fractalshards.verify import Problem, Promise, verify_shard


@dataclass(frozen=True)
class Repaired:
    """What was wrong with a dataset, and which shards were rendered again, by name."""

    problems: tuple[Problem, ...]
    rendered: tuple[str, ...]


def repair_dataset(folder: Path, engine: Engine) -> Repaired:
    """Verify a dataset, render again what is damaged or missing, and revise the manifest.

    The result has the content digests of an undisturbed build.

    Raises:
        FractalError: if nothing sound says what to build, or shards come out with other contents than the manifest
            promised, so that it or this software is wrong; else as ``run_build``.
        OSError: as the file system does.
    """
    recipe, systems = restore(folder)
    promised = _promised(folder)
    problems = _find_damage(folder, recipe, promised, engine)
    for name in {problem.file for problem in problems}:
        (folder / sidecar_name(name)).unlink(missing_ok=True)
    plan = plan_build(folder, recipe, engine.workers, systems)
    run_build(plan, engine.executor)
    rendered = tuple(task.name for task in plan.missing)
    _check_promise(load_manifest(folder), promised, rendered)
    return Repaired(tuple(problems), rendered)


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
    present = {task: promised.get(task.name, records[task.name].shard()) for task in tasks if task.name in records}
    problems: list[Problem] = []
    samples = sum(shard.samples for shard in present.values())
    with progress("verifying", samples, "images") as advance:
        futures = {
            engine.executor.submit(verify_shard, folder.absolute(), shard, task.first, promise): shard
            for task, shard in present.items()
        }
        for future in as_completed(futures):
            problems += future.result()
            advance(futures[future].samples)
    return sorted(problems, key=lambda problem: (problem.file, problem.key))


def _check_promise(manifest: Manifest, promised: dict[str, Shard], rendered: tuple[str, ...]) -> None:
    new = {shard.name: shard.content_digest for shards in manifest.splits.values() for shard in shards}
    other = [name for name in rendered if name in promised and promised[name].content_digest != new[name]]
    if other:
        raise FractalError(
            f"{manifest.folder}: rendered again, {human_list(other)} differ from what the manifest promised: the "
            "manifest was damaged, or this software renders other pixels; compare with another copy"
        )
