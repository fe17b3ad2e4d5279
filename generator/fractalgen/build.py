"""How large a dataset will be and how long it takes: measured on a few of its own samples before any is written."""

import errno
import os
import shutil
import socket
import statistics
import time
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from fractalgen.kernels.deflate import encode_image
from fractalgen.kinds import find_kind
from fractalgen.kinds.kind import MAX_MAPS
from fractalgen.plan import locate, shard_tasks
from fractalgen.recipe import RECIPE_VERSION, Recipe, parse_recipe
from fractalgen.render import draw_systems, render_range, render_unit
from fractalshards.console import notice
from fractalshards.digest import systems_digest
from fractalshards.errors import FractalError
from fractalshards.fields import Fields
from fractalshards.human import human_bytes, human_seconds
from fractalshards.manifest import (
    INFO,
    RECIPE,
    SYSTEMS,
    claim_folder,
    recipe_problems,
    refuse_other,
    sample_key,
    stored_recipe,
)
from fractalshards.png import pixels_of
from fractalshards.slices import Slice
from fractalshards.storage import remove_leftovers
from fractalshards.systems import Systems, read_systems, write_systems
from fractalshards.workers import OnProgress, no_progress
from fractalshards.writer import (
    Contents,
    ShardTask,
    finished_shards,
    pack_rendered,
    publish,
    refuse_vanished,
    run_jobs,
    write_shard,
)

_PROBES = 32
_PROBE_SECONDS = 3.0
_MARGIN = 1.05


@dataclass(frozen=True)
class Forecast:
    """Expected cost of ``samples`` samples: bytes on disk, and seconds with the workers that were named."""

    samples: int
    bytes: float
    seconds: float

    def __str__(self) -> str:
        return f"about {human_bytes(self.bytes)}, about {human_seconds(self.seconds)}"


def forecast(recipe: Recipe, systems: Systems, samples: int, workers: int) -> Forecast:
    """Measure a few units, spread over the dataset, and extrapolate to ``samples`` samples.

    The median of their times counts, for some may pay for compilation, once after an install.
    """
    total = recipe.n + recipe.val
    with notice("getting ready; the first run after an install compiles ..."):
        _stored_bytes(recipe, systems, 0)
    sizes: list[int] = []
    seconds: list[float] = []
    while len(seconds) < min(_PROBES, total) and sum(seconds) < _PROBE_SECONDS:
        start = time.perf_counter()
        unit = _stored_bytes(recipe, systems, len(seconds) * total // min(_PROBES, total))
        seconds.append((time.perf_counter() - start) / len(unit))
        sizes += unit
    return Forecast(samples, samples * statistics.mean(sizes), samples * statistics.median(seconds) / workers)


def check_space(folder: Path, expected: Forecast) -> None:
    """Refuse a build that the disk cannot hold.

    Raises:
        OSError: if nothing can be written there at all.
        FractalError: if the expected bytes, with 5 % to spare, exceed what is free where the folder is or will be.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not os.access(existing, os.W_OK, effective_ids=True):
        number = errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(number, os.strerror(number), str(existing))
    total, _, free = shutil.disk_usage(existing)
    if total and expected.bytes * _MARGIN > free:
        raise FractalError(
            f"{folder}: needs about {human_bytes(expected.bytes)}, the disk has {human_bytes(free)} free; "
            "free some space, choose another --out, or ask for fewer or smaller images"
        )


def _stored_bytes(recipe: Recipe, systems: Systems, index: int) -> list[int]:
    """Bytes that each sample of a sample's unit takes in its shard, all work done that a build does on them."""
    images = render_unit(recipe, systems, locate(recipe, index).unit)
    for image, _ in images:
        pixels_of(image)
    return [len(pack_rendered(sample_key(index), rendered, encode_image)) for rendered in images]


def settle(folder: Path, recipe: Recipe, given: Systems | None = None) -> tuple[Recipe, Systems]:
    """The recipe bound to its systems: those given, those the folder stores, or newly drawn ones. Writes nothing.

    Raises:
        FractalError: if the folder holds another recipe, damaged systems, or something that is no dataset.
        OSError: if it cannot be read.
    """
    if given is not None:
        _check_systems(recipe, given, "the systems that were given")
    if (found := stored_recipe(folder)) is not None:
        return _settled(folder, found, recipe, given)
    systems = draw_systems(recipe) if given is None else given
    return recipe.with_systems(systems), systems


def claim(folder: Path, recipe: Recipe, systems: Systems) -> None:
    """Write the recipe and then its systems into a new folder; one that has them is left as it is.

    Of two builds that begin at once in one folder, one publishes its recipe; the other finds it there.

    Raises:
        FractalError: if the folder holds another recipe by now.
        OSError: if it cannot be written.
    """
    claim_folder(folder, recipe.to_json())
    _settled(folder, recipe.to_json(), recipe, systems)
    if not (folder / SYSTEMS).exists():
        write_systems(folder / SYSTEMS, systems)


def restore(folder: Path) -> tuple[Recipe, Systems]:
    """Recipe and systems of a folder in which either file may be damaged or missing; such a file is written again.

    The recipe is in the manifest too, and systems that were not given to the build can be drawn again.

    Raises:
        FractalError: if neither file has a sound recipe of this software's version, or the systems cannot be had.
        OSError: if a file cannot be read or written.
    """
    recipe = _sound_recipe(folder)
    systems = _sound_systems(folder / SYSTEMS, recipe)
    _check_systems(recipe, systems, str(folder / SYSTEMS))
    claim(folder, recipe, systems)
    return recipe, systems


def _sound_recipe(folder: Path) -> Recipe:
    if not any((folder / name).exists() for name in (RECIPE, INFO)):
        raise FractalError(f"{folder}: neither {RECIPE} nor {INFO} is there, so nothing says what to build")
    try:
        return _read_recipe(folder / RECIPE)
    except (FractalError, FileNotFoundError):
        recipe = _read_recipe(folder / INFO)
        (folder / RECIPE).unlink(missing_ok=True)
        return recipe


def _read_recipe(path: Path) -> Recipe:
    fields = Fields.read(path)
    recipe = parse_recipe(fields.mapping("recipe"), str(path))
    for problem in recipe_problems(recipe.to_json(), fields.text("recipe_digest")):
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


def _check_systems(recipe: Recipe, systems: Systems, where: str) -> None:
    """Refuse systems that the recipe's kind cannot render: they may come from elsewhere."""
    shape = find_kind(recipe.kind).map_shape
    fitting = all(system.shape[1:] == shape and 1 <= len(system) <= MAX_MAPS for system in systems)
    if len(systems) != recipe.classes or not fitting:
        raise FractalError(
            f"{where}: not {recipe.classes} systems of 1 to {MAX_MAPS} maps of shape {shape}, as kind {recipe.kind} "
            "renders them; check the file"
        )


def _settled(folder: Path, found: dict[str, Any], recipe: Recipe, given: Systems | None) -> tuple[Recipe, Systems]:
    bound = recipe.with_systems(given) if given else replace(recipe, systems_digest=str(found.get("systems_digest")))
    refuse_other(folder, found, bound.to_json())
    stored = folder / SYSTEMS
    systems = read_systems(stored) if stored.exists() else given or draw_systems(recipe)
    _check_systems(bound, systems, str(stored))
    if systems_digest(systems) != bound.systems_digest:
        raise FractalError(
            f"{stored}: not the systems that {RECIPE} names, or missing; restore it, give --categories or --from-csv "
            "as in the first build, or use a new folder"
        )
    return bound, systems


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


def run_build(plan: Plan, executor: Executor, on_progress: OnProgress = no_progress) -> tuple[str, ...]:
    """Render what is missing, then finish the dataset; see ``render_missing`` and ``finish_dataset``."""
    render_missing(plan, executor, on_progress)
    return finish_dataset(plan)


def render_missing(plan: Plan, executor: Executor, on_progress: OnProgress = no_progress) -> None:
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
    run_jobs(jobs, executor, plan.folder, on_progress)


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
    write_shard(folder, task.name, recipe.classes, samples, encode_image)


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
