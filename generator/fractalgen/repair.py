"""Repairs a dataset: verifies every shard, then renders again what is damaged or missing.

A damaged shard loses its sidecar, which makes it unfinished; the rest is an ordinary build. A repair that was killed is
therefore continued by the same command, or by ``fractalgen build``.
"""

from collections.abc import Mapping
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from fractalgen.build import BuildFolder, claim, finish_dataset, plan_build, render_missing
from fractalgen.recipe import Recipe, parse_recipe
from fractalgen.render import draw_systems
from fractalshards.digest import systems_digest
from fractalshards.errors import FractalError
from fractalshards.human import human_list
from fractalshards.manifest import (
    INFO,
    RECIPE,
    SYSTEMS,
    Manifest,
    RecipeFile,
    Shard,
    load_manifest,
    recipe_problems,
    sidecar_name,
)
from fractalshards.storage import read_json
from fractalshards.systems import Systems, read_systems
from fractalshards.verify import Problem, Promise, verify_shards
from fractalshards.workers import OnProgress, no_progress


@dataclass(frozen=True)
class Repaired:
    """What was wrong with a dataset, the names of the shards rendered again, and of tars that are not its shards."""

    problems: tuple[Problem, ...]
    rendered: tuple[str, ...]
    strangers: tuple[str, ...]


def repair_dataset(folder: Path, executor: Executor, on_progress: OnProgress = no_progress) -> Repaired:
    """Verify a dataset, render again what is damaged or missing, and renew the manifest.

    The result has the content digests of an undisturbed build.

    Args:
        folder: of the dataset, finished or not.
        executor: see ``executors.open_executor``.
        on_progress: called with the images verified and rendered so far, and with the total.

    Raises:
        FractalError: if no sound file says what to build, or a rendered shard differs from what the manifest promises,
            so that it or this software is wrong; the manifest then stays as it is. Also as ``run_build``.
        OSError: as the file system does.
    """
    manifest = _sound_manifest(folder)
    found = _recover(folder, manifest)
    listed = {shard.name: shard for shards in manifest.splits.values() for shard in shards} if manifest else {}
    names = {task.name for task in found.tasks}
    if listed and not names <= listed.keys():
        raise FractalError(
            f"{folder}: holds a part of a dataset; fetch damaged shards again with 'fractalshards pull', or render the "
            "rest with 'fractalgen build'"
        )
    problems = _verify(found, listed, executor, on_progress)
    damaged = {problem.file for problem in problems}
    for name in damaged:
        (folder / sidecar_name(name)).unlink(missing_ok=True)
    sound = {name: record for name, record in found.finished.items() if name not in damaged}
    plan = plan_build(replace(found, finished=sound))
    verified = sum(record.samples for record in found.finished.values())
    rendered = render_missing(plan, executor, lambda done, total: on_progress(verified + done, verified + total))
    both = rendered.keys() & listed.keys()
    if other := sorted(name for name in both if rendered[name].content_digest != listed[name].content_digest):
        raise FractalError(
            f"{folder}: rendered again, {human_list(other)} differ from what {INFO} promises: it is damaged, or this "
            f"software renders other pixels; compare with another copy, or remove {INFO} to accept the new renders"
        )
    finish_dataset(plan)
    strangers = sorted({path.name for path in folder.glob("[!.]*.tar")} - names)
    return Repaired(tuple(problems), tuple(task.name for task in plan.missing), tuple(strangers))


def _sound_manifest(folder: Path) -> Manifest | None:
    try:
        return load_manifest(folder)
    except FractalError:
        return None


def _recover(folder: Path, manifest: Manifest | None) -> BuildFolder:
    """Read a folder in which recipe or systems may be damaged or missing, and write them again.

    The manifest holds the recipe too, and systems that were not given to the build can be drawn again.
    """
    recipe = _sound_recipe(folder, manifest)
    found = BuildFolder.read(folder, recipe, _sound_systems(folder / SYSTEMS, recipe))
    claim(found)
    return found


def _sound_recipe(folder: Path, manifest: Manifest | None) -> Recipe:
    path = folder / RECIPE
    try:
        return _check_recipe(read_json(path, RecipeFile), path)
    except (FractalError, FileNotFoundError):
        if manifest is None:
            raise
        recipe = _check_recipe(manifest, folder / INFO)
        path.unlink(missing_ok=True)
        return recipe


def _check_recipe(stored: RecipeFile | Manifest, path: Path) -> Recipe:
    recipe = parse_recipe(stored.recipe, str(path))
    for problem in recipe_problems(stored.recipe, stored.recipe_digest):
        raise FractalError(f"{path}: {problem}; fetch it again")
    return recipe


def _sound_systems(path: Path, recipe: Recipe) -> Systems:
    with suppress(FractalError, FileNotFoundError):
        stored = read_systems(path)
        if systems_digest(stored) == recipe.systems_digest:
            return stored
    drawn = draw_systems(recipe)
    if systems_digest(drawn) != recipe.systems_digest:
        raise FractalError(f"{path}: damaged or missing, and not what this software draws; fetch it again")
    path.unlink(missing_ok=True)
    return drawn


def _verify(
    folder: BuildFolder, listed: Mapping[str, Shard], executor: Executor, on_progress: OnProgress
) -> list[Problem]:
    """Verify the finished shards against the manifest, or where it lists none, against their sidecars."""
    promise = Promise(folder.recipe.classes, folder.recipe.size, folder.contents.label_type)
    finished = [(folder.finished[task.name], task.first) for task in folder.tasks if task.name in folder.finished]
    shards = [(listed.get(record.name, record.shard()), first) for record, first in finished]
    return sorted(verify_shards(executor, folder.path.absolute(), shards, promise, on_progress))
