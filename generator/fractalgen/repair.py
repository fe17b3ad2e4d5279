"""Repairs a dataset: verifies every shard, then renders damaged and missing ones again.

A damaged shard loses its sidecar, which makes it unfinished; the rest is an ordinary build. So the same command, or
``fractalgen build``, continues a repair that was killed.
"""

from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fractalgen.build import BuildFolder, claim, dataset_info, plan_build, render_missing
from fractalgen.recipe import parse_recipe
from fractalgen.render import draw_systems
from fractalshards.digest import systems_digest
from fractalshards.errors import FractalError
from fractalshards.human import human_list
from fractalshards.manifest import INFO, RECIPE, SYSTEMS, Manifest, load_manifest, sidecar_name
from fractalshards.recipe_file import RecipeFile
from fractalshards.storage import read_json
from fractalshards.systems import Systems, read_systems
from fractalshards.verify import Problem, Promise, verify_shards
from fractalshards.workers import OnProgress, no_progress
from fractalshards.writer import publish


def repair_dataset(
    folder: Path, executor: Executor, on_progress: OnProgress = no_progress, on_prepare: OnProgress = no_progress
) -> tuple[list[Problem], list[str], list[str]]:
    """Verify a dataset, finished or not, render damaged and missing shards again, and update the manifest.

    The result has the content digests of an uninterrupted build. ``on_progress`` is called with the number of images
    verified and rendered, and the total; for ``on_prepare`` see ``draw_systems``. Returns the problems that were found,
    and names: of shards rendered again, and of tars that do not belong to the dataset. Raises FractalError as
    ``run_build``; also if neither recipe nor manifest can be read, or a rendered shard differs from the manifest, which
    then stays as it is.
    """
    manifest = None
    with suppress(FractalError):
        manifest = load_manifest(folder)
    found = _recover(folder, manifest, on_prepare)
    listed = {shard.name: shard for shards in manifest.splits.values() for shard in shards} if manifest else {}
    names = {task.name for task in found.tasks}
    if listed and not names <= listed.keys():
        raise FractalError(f"{folder}: part of a dataset; use 'fractalshards pull' again, or 'fractalgen build'")
    promise = Promise(found.recipe.classes, found.recipe.size, found.recipe.family.label_type)
    finished = [(found.finished[task.name], task.first) for task in found.tasks if task.name in found.finished]
    shards = [(listed.get(record.name, record.shard()), first) for record, first in finished]
    problems = sorted(verify_shards(executor, folder.absolute(), shards, promise, on_progress))
    damaged = {problem.file for problem in problems}
    for name in damaged:
        (folder / sidecar_name(name)).unlink(missing_ok=True)
    sound = {name: record for name, record in found.finished.items() if name not in damaged}
    plan = plan_build(replace(found, finished=sound), on_progress=on_prepare)
    verified = sum(record.samples for record, _ in finished)
    rendered = render_missing(plan, executor, lambda done, total: on_progress(verified + done, verified + total))
    both = rendered.keys() & listed.keys()
    if other := sorted(name for name in both if rendered[name].content_digest != listed[name].content_digest):
        advice = f"compare with another copy, or remove {INFO} to accept them"
        raise FractalError(f"{folder}: rendered again, {human_list(other)} differ from {INFO}; {advice}")
    publish(folder, found.tasks, found.tasks, dataset_info(found.recipe))
    extra = sorted({path.name for path in folder.glob("[!.]*.tar")} - names)
    return problems, [task.name for task in plan.missing], extra


def _recover(folder: Path, manifest: Manifest | None, on_prepare: OnProgress) -> BuildFolder:
    """Read a folder; restore a damaged recipe from the manifest, and damaged systems by drawing them."""
    stale = []
    try:
        stored = read_json(folder / RECIPE, RecipeFile)
        recipe = parse_recipe(stored.recipe, stored.recipe_digest, str(folder / RECIPE))
    except (FractalError, FileNotFoundError):
        if manifest is None:
            raise
        recipe = parse_recipe(manifest.recipe, manifest.recipe_digest, str(folder / INFO))
        stale.append(RECIPE)
    systems: Systems = ()
    with suppress(FractalError, FileNotFoundError):
        systems = read_systems(folder / SYSTEMS)
    if systems_digest(systems) != recipe.systems_digest:
        systems = draw_systems(recipe, on_prepare)
        stale.append(SYSTEMS)
    found = BuildFolder.read(folder, recipe, systems)
    for name in stale:
        (folder / name).unlink(missing_ok=True)
    claim(found)
    return found
