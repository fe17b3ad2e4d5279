"""Benchmark the generator: the time of each stage, the whole pipeline, and how it scales with workers.

    python tools/bench_generator.py --kind all --json bench.json

Stages are timed inside the real pipeline, by wrapping the functions that it calls. Totals are measured without the
wrappers, over whole shards in worker processes, as ``fractalgen build`` runs them: rendering, PNG, tar, hashing and
writing. Each round runs all worker counts in turn, and the table shows the median round, because machines are noisy.
"""

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from fractalgen import build, draw_systems, make_recipe, render
from fractalgen.build import build_shard
from fractalgen.kernels import fractaldb as kernel
from fractalgen.kinds import KINDS, anderson, contours, multi, single
from fractalgen.plan import shard_tasks
from fractalgen.recipe import Recipe
from fractalshards import writer
from fractalshards.digest import ContentDigest
from fractalshards.human import human_count, human_seconds
from fractalshards.systems import Systems
from fractalshards.workers import worker_pool

Stage = tuple[Any, str]  # the object on which the pipeline looks a function up, and its name

_MILLION = 1_000_000
_BLURRED = [(anderson, "diamond_square"), (anderson, "gaussian_blur")]
_STORED: list[Stage] = [(build, "encode_image"), (writer, "pixels_of"), (ContentDigest, "add"), (writer, "pack_sample")]
_CONTOURS: list[Stage] = [(contours, name) for name in ("_skip", "_waves", "draw_ring")]
_WHOLE: list[Stage] = [(render, "render_unit")]  # for kinds that are not in _STAGES
_STAGES: dict[str, list[Stage]] = {
    "fractaldb": [(kernel, name) for name in ("masks", "orbit", "_draw_patches")],
    "single": [(single, name) for name in ("jitter", "chaos_game", "bounding_box", "splat", "paint")] + _BLURRED,
    "multi": [(multi, name) for name in ("chaos_game", "bounding_box", "splat", "paint", "resize")] + _BLURRED,
    "visualatom": _CONTOURS,
    "rcdb": _CONTOURS,
    "onepfrac": [(kernel, name) for name in ("masks", "orbit", "_draw_patches")],
}


@click.command()
@click.option("--kind", default="all", show_default=True, type=click.Choice([*KINDS, "all"]))
@click.option("--size", type=int, help="Side length in pixels.  [default: by kind]")
@click.option("--shard-size", default=1000, show_default=True, help="Images per shard, and per worker and round.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Rounds to take the median of.")
@click.option("--workers", "counts", multiple=True, default=(1, 2), show_default=True, type=click.IntRange(1),
              help="Worker processes; may be repeated.")  # fmt: skip
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the results to this file.")
def main(
    kind: str, size: int | None, shard_size: int, rounds: int, counts: tuple[int, ...], json_path: Path | None
) -> None:
    """Benchmark the generator on this machine."""
    kinds = list(KINDS) if kind == "all" else [kind]
    reports = []
    for name in kinds:
        recipe = make_recipe(name, _MILLION, size=size, shard_size=shard_size)
        report = _measure(recipe, counts, rounds)
        _print(report)
        reports.append(report)
    if json_path:
        json_path.write_text(json.dumps([report.to_json() for report in reports], indent=1))


@dataclass(frozen=True)
class Report:
    """The results for a kind: ms per image of each stage in one worker, and images/s by number of workers."""

    recipe: Recipe
    stages_ms: dict[str, float]
    images_per_second: dict[int, float]
    bytes_in_shard: float
    bytes_of_png: float

    def to_json(self) -> dict[str, Any]:
        """Return all results, with the sums and extrapolations."""
        totals = {"total_ms": sum(self.stages_ms.values()), "seconds_per_million": self.seconds_per_million()}
        return {**asdict(self), **totals}

    def seconds_per_million(self) -> dict[int, float]:
        """Extrapolate the time of a million images, by number of workers."""
        return {count: _MILLION / rate for count, rate in self.images_per_second.items()}


def _measure(recipe: Recipe, counts: Sequence[int], rounds: int) -> Report:
    systems = draw_systems(recipe)
    recipe = recipe.with_systems(systems)
    with tempfile.TemporaryDirectory() as folder:
        rates = _measure_workers(Path(folder), recipe, systems, counts, rounds)
        with worker_pool(1) as pool:
            task = import_module(Path(__file__).stem)._measure_stages  # workers do not run the main module
            stages, png = pool.submit(task, Path(folder), recipe, systems).result()
        stored = [shard.stat().st_size for shard in Path(folder).glob("*.tar")]
    return Report(recipe, stages, rates, sum(stored) / len(stored) / recipe.shard_size, png)


def _measure_workers(
    folder: Path, recipe: Recipe, systems: Systems, counts: Sequence[int], rounds: int
) -> dict[int, float]:
    """Return the images per second for each number of workers, as the median of the rounds."""
    with ExitStack() as stack:
        pools = {count: stack.enter_context(worker_pool(count)) for count in counts}
        for count, pool in pools.items():
            _time_round(pool, folder, recipe, systems, count)
        seconds: dict[int, list[float]] = defaultdict(list)
        for _ in range(rounds):
            for count, pool in pools.items():
                seconds[count].append(_time_round(pool, folder, recipe, systems, count))
    return {count: count * recipe.shard_size / statistics.median(times) for count, times in seconds.items()}


def _time_round(pool: Executor, folder: Path, recipe: Recipe, systems: Systems, count: int) -> float:
    """Return the seconds in which each worker of a pool writes one shard."""
    start = time.perf_counter()
    futures = [pool.submit(build_shard, folder, recipe, systems, task) for task in shard_tasks(recipe)[:count]]
    wait(futures)
    seconds = time.perf_counter() - start
    for future in futures:
        future.result()
    return seconds


def _measure_stages(folder: Path, recipe: Recipe, systems: Systems) -> tuple[dict[str, float], float]:
    """Measure the ms per image of every stage and of the rest, in a worker process, and the mean size of a PNG."""
    task = shard_tasks(recipe)[0]
    build_shard(folder, recipe, systems, task)
    spent: dict[str, float] = defaultdict(float)
    sizes: list[int] = []

    def measured(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return _timed(spent, name, _sized(sizes, function) if name == "encode_image" else function)

    with _replaced(_STAGES.get(recipe.kind, _WHOLE) + _STORED, measured):
        start = time.perf_counter()
        build_shard(folder, recipe, systems, task)
        total = time.perf_counter() - start
    spent["writing, sha256, the rest"] = total - sum(spent.values())
    samples = task.stop - task.first
    return {name: 1000 * seconds / samples for name, seconds in spent.items()}, sum(sizes) / len(sizes)


def _sized(sizes: list[int], encode: Callable[..., bytes]) -> Callable[..., bytes]:
    """Wrap an encoder to record the length of its results."""

    def sized(image: Any) -> bytes:
        data = encode(image)
        sizes.append(len(data))
        return data

    return sized


def _timed(spent: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function to add its time to ``spent[name]``."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent[name] += time.perf_counter() - start
        return result

    return timed


@contextmanager
def _replaced(stages: list[Stage], replace: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace functions where they are looked up, inside the block."""
    originals = [(owner, name, getattr(owner, name)) for owner, name in stages]
    for owner, name, function in originals:
        setattr(owner, name, replace(name, function))
    try:
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def _print(report: Report) -> None:
    recipe = report.recipe
    points = f", {recipe.points:,} points" if recipe.points else ""
    table = Table("stage", "ms per image", title=f"{recipe.kind} {recipe.size} x {recipe.size}{points}")
    for name, milliseconds in sorted(report.stages_ms.items(), key=lambda stage: -stage[1]):
        table.add_row(name, f"{milliseconds:.3f}")
    table.add_row("sum of the stages, one worker", f"{sum(report.stages_ms.values()):.3f}", style="bold")
    rates = report.images_per_second
    for count, seconds in report.seconds_per_million().items():
        text = f"{human_count(count, 'worker')}: {rates[count]:,.0f} images/s, a million in {human_seconds(seconds)}"
        table.add_row(text, f"{1000 * count / rates[count]:.3f} per core")
    first, *others = rates
    for count in others:
        table.add_row(f"{count} workers against {first}", f"{rates[count] / rates[first]:.2f} times")
    table.add_row("bytes per PNG, per image in the shard", f"{report.bytes_of_png:,.0f}, {report.bytes_in_shard:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
