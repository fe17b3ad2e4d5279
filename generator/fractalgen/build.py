"""Builds a dataset: reads its folder once, plans, renders the missing shards, and writes the manifest."""

import logging
import socket
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path

from fractalgen.kernels.deflate import encode_image
from fractalgen.plan import locate, shard_tasks
from fractalgen.recipe import RECIPE_VERSION, Recipe
from fractalgen.render import check_systems, draw_systems, render_range, render_unit
from fractalshards.digest import systems_digest
from fractalshards.errors import FractalError
from fractalshards.human import human_bytes, human_count, human_seconds
from fractalshards.manifest import SYSTEMS, DatasetInfo, ShardRecord, sample_key
from fractalshards.recipe_file import claim_folder, refuse_other, stored_recipe
from fractalshards.sample import packed_size
from fractalshards.settings import Slice
from fractalshards.storage import check_space, remove_leftovers
from fractalshards.systems import MAP_SHAPES, Systems, read_systems, write_systems
from fractalshards.workers import OnProgress, no_progress
from fractalshards.writer import ShardTask, encode_rendered, finished_shards, publish, run_jobs, write_shard

_PROBES, _FEW_PROBES = 32, 8  # units to measure; few if rendering one takes as long as many images
_PROBE_SECONDS = 3.0
_MARGIN = 1.05
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BuildFolder:
    """The folder of a dataset, which may not exist yet, read once per command.

    The recipe has the digest of the systems, one float64 array per class; ``finished`` holds the records of finished
    shards by name.
    """

    path: Path
    recipe: Recipe
    systems: Systems
    tasks: tuple[ShardTask, ...]
    finished: Mapping[str, ShardRecord]

    @classmethod
    def read(cls, path: Path, recipe: Recipe, systems: Systems) -> "BuildFolder":
        """Find the finished shards of a recipe, and remove leftovers of killed builds.

        Raises FractalError if the systems do not match the recipe's digest, or its kind cannot render them.
        """
        if systems_digest(systems) != recipe.systems_digest:
            advice = "fetch the file again, or give the same --categories or --from-csv as before"
            raise FractalError(f"{path / SYSTEMS}: missing or damaged; {advice}")
        check_systems(recipe, systems, path / SYSTEMS)
        tasks = shard_tasks(recipe)
        finished = finished_shards(path, tasks, dataset_info(recipe))
        remove_leftovers(path)
        return BuildFolder(path, recipe, systems, tasks, finished)


def dataset_info(recipe: Recipe) -> DatasetInfo:
    """Return the fields of a manifest that follow from the recipe."""
    kind = recipe.family
    return DatasetInfo(recipe.to_json(), kind.label_type, recipe.classes, format_version=MAP_SHAPES[kind.map_shape])


def open_folder(
    path: Path, recipe: Recipe, given: Systems | None = None, on_progress: OnProgress = no_progress
) -> BuildFolder:
    """Read the folder in which to build a recipe. Removes leftovers of killed builds, and writes nothing.

    Raises FractalError if the folder holds another recipe, damaged systems, or something that is not a dataset.

    Args:
        path: a folder that holds this dataset, is empty, or does not exist yet.
        recipe: what to build; the digest of its systems is filled in.
        given: the systems to render. By default those that the folder stores, or newly drawn ones.
    """
    stored = stored_recipe(path)
    if stored is None:
        systems = draw_systems(recipe, on_progress) if given is None else given
        return BuildFolder.read(path, recipe.with_systems(systems), systems)
    digest = str(stored.get("systems_digest")) if given is None else systems_digest(given)
    recipe = replace(recipe, systems_digest=digest)
    refuse_other(path, stored, recipe.to_json())
    systems = read_systems(path / SYSTEMS) if (path / SYSTEMS).exists() else draw_systems(recipe, on_progress)
    return BuildFolder.read(path, recipe, systems)


@dataclass(frozen=True)
class Plan:
    """A build that is ready to run.

    Attributes:
        own: the shards that this build has to finish: all of them, or its slice.
        missing: the shards in ``own`` that are not finished.
        samples: the number of samples in the missing shards.
        bytes: their expected size on disk.
        seconds: the expected time of one core to render them.
    """

    folder: BuildFolder
    own: tuple[ShardTask, ...]
    missing: tuple[ShardTask, ...]
    samples: int
    bytes: float
    seconds: float

    def describe(self, slice_: Slice | None, workers: int, scheduler: str | None) -> str:
        """Return the planned work in one line, given the number of workers, and the scheduler if they are Dask's."""
        recipe, of_slice = self.folder.recipe, f" of {slice_}" if slice_ else ""
        if not self.missing:
            return f"nothing to render: {human_count(len(self.own), 'shard')}{of_slice} already finished"
        done = len(self.own) - len(self.missing)
        workers = min(workers, len(self.missing))
        return (
            f"{recipe.n + recipe.val:,} images of {recipe.size} x {recipe.size} in "
            f"{human_count(len(self.folder.tasks), 'shard')}; to render{of_slice}: {self.samples:,} images in "
            f"{human_count(len(self.missing), 'shard')}{f' ({done:,} done)' if done else ''}, about "
            f"{human_bytes(self.bytes)} and {human_seconds(self.seconds / workers)} with "
            f"{human_count(workers, 'worker')}{f' of {scheduler}' if scheduler else ''}"
        )


def plan_build(folder: BuildFolder, slice_: Slice | None = None, on_progress: OnProgress = no_progress) -> Plan:
    """Decide which shards to render, all or those of a slice, and check that the disk can hold them.

    Raises FractalError if the disk cannot hold the missing shards, plus 5 %.
    """
    own = slice_.of(folder.tasks) if slice_ else folder.tasks
    missing = tuple(task for task in own if task.name not in folder.finished)
    if not missing:
        return Plan(folder, own, missing, 0, 0.0, 0.0)
    folder.recipe.family.prepare(folder.recipe.params, folder.recipe.classes, on_progress)
    _log.info("measuring a few images; the first run after installing also compiles ...")
    samples = sum(task.stop - task.first for task in missing)
    stored, seconds = measure_images(folder.recipe, folder.systems)
    check_space(folder.path, samples * stored * _MARGIN, "choose another --out, or ask for fewer or smaller images")
    return Plan(folder, own, missing, samples, samples * stored, samples * seconds)


def measure_images(recipe: Recipe, systems: Systems) -> tuple[float, float]:
    """Render and encode a few units spread over the dataset; return an image's mean bytes, and median seconds."""
    sizes: list[int] = []
    seconds: list[float] = []
    total = recipe.n + recipe.val
    probes = min(max(_PROBES // recipe.family.images_in_memory, _FEW_PROBES), total)
    for number in (0, *range(probes)):  # the first unit twice: the first time may include compilation
        start = time.perf_counter()
        index = number * total // probes
        place = locate(recipe, index)
        images = islice(render_unit(recipe, systems, place.unit), place.parts)
        encoded = [encode_rendered(sample_key(index), rendered, encode_image) for rendered in images]
        sizes += [packed_size(one.sample) for one in encoded]
        seconds.append((time.perf_counter() - start) / len(encoded))
        if sum(seconds[1:]) >= _PROBE_SECONDS:
            break
    return statistics.mean(sizes), statistics.median(seconds[1:])


def run_build(plan: Plan, executor: Executor, on_progress: OnProgress = no_progress) -> tuple[str, ...]:
    """Write recipe and systems, render the missing shards, and write the manifest if all shards are there.

    Returns the names of missing shards, which other slices have yet to build. ``on_progress`` is called with the number
    of images rendered, and the total. Raises FractalError if a build of another recipe has claimed the folder in the
    meantime, some shards repeatedly killed their workers (the others are rendered), or finished shards have
    disappeared; OSError if the file system fails. Finished shards stay.
    """
    claim(plan.folder)
    render_missing(plan, executor, on_progress)
    return publish(plan.folder.path, plan.folder.tasks, plan.own, dataset_info(plan.folder.recipe))


def claim(folder: BuildFolder) -> None:
    """Write the recipe, then the systems, unless the folder has them; see ``claim_folder``."""
    claim_folder(folder.path, folder.recipe.to_json())
    if not (folder.path / SYSTEMS).exists():
        write_systems(folder.path / SYSTEMS, folder.systems)


def render_missing(plan: Plan, executor: Executor, on_progress: OnProgress = no_progress) -> dict[str, ShardRecord]:
    """Write the missing shards of a claimed folder, and return their records by name."""
    path = plan.folder.path.absolute()
    jobs = {task: partial(finish_shard, path, plan.folder.recipe, task) for task in plan.missing}
    return {record.name: record for record in run_jobs(jobs, executor, plan.folder.path, on_progress)}


def build_shard(folder: Path, recipe: Recipe, systems: Systems, task: ShardTask) -> ShardRecord:
    """Render and write one shard; apart from the files written, a pure function of its arguments."""
    samples = render_range(recipe, systems, task.first, task.stop)
    return write_shard(folder, task.name, recipe.classes, samples, encode_image)


def finish_shard(folder: Path, recipe: Recipe, task: ShardTask) -> ShardRecord:
    """Build a shard in a worker, perhaps on another machine, unless another build has just finished it."""
    host = socket.gethostname()
    if recipe.version != RECIPE_VERSION:  # unpickling does not check it
        versions = f"renders recipe version {RECIPE_VERSION}, not {recipe.version}"
        raise FractalError(f"{host}: {versions}; install the same fractalpretrain everywhere")
    if not folder.is_dir():
        raise FractalError(f"{folder}: does not exist on {host}; all workers need it under the same path")
    finished = finished_shards(folder, (task,), dataset_info(recipe))
    if task.name in finished:
        return finished[task.name]
    return build_shard(folder, recipe, _worker_systems(folder / SYSTEMS, recipe.systems_digest), task)


@lru_cache(maxsize=1)
def _worker_systems(path: Path, digest: str) -> Systems:
    """The systems of a folder, read once per worker."""
    systems = read_systems(path)
    if systems_digest(systems) != digest:
        raise FractalError(f"{path}: not the systems of this build; run the same command again")
    return systems
