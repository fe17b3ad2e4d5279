"""Measures the generator: every stage in ms per image and core, the whole pipeline, and how it scales with workers.

    python tools/bench_generator.py --kind single --json bench.json

The stages are timed inside the real pipeline, by wrapping the functions that it calls; the totals are measured
without those wrappers, over whole shards in worker processes as ``fractalgen build`` runs them: rendering, PNG, tar,
hashing and writing. Worker counts take turns, and the median of the rounds is given, for machines are noisy.
"""

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from fractalgen import build, draw_systems, make_recipe
from fractalgen.build import build_shard
from fractalgen.kinds import single
from fractalgen.plan import shard_tasks
from fractalgen.recipe import Recipe
from fractalshards import writer
from fractalshards.human import human_seconds
from fractalshards.systems import Systems
from fractalshards.workers import worker_pool

_STAGES: dict[str, list[tuple[ModuleType, str]]] = {
    "single": [
        (single, "jitter"),
        (single, "chaos_game"),
        (single, "bounding_box"),
        (single, "splat"),
        (single, "diamond_square"),
        (single, "paint"),
        (single, "gaussian_blur"),
        (build, "encode_png"),
        (writer, "pack_sample"),
    ]
}


@click.command()
@click.option("--kind", default="single", show_default=True)
@click.option("--size", type=int, help="Side length in pixels.  [default: by kind]")
@click.option("--shard-size", default=200, show_default=True, help="Images of one shard; a worker renders one a round.")
@click.option("--rounds", default=5, show_default=True, help="Measurements of which the median is given.")
@click.option("--workers", default="1,2", show_default=True, help="Worker counts to compare.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the numbers here.")
def main(kind: str, size: int | None, shard_size: int, rounds: int, workers: str, json_path: Path | None) -> None:
    """Measure the generator on this machine."""
    counts = [int(count) for count in workers.split(",") if count.isdigit()] or [1]
    recipe = make_recipe(kind, max(1000, shard_size * max(counts)), size=size, shard_size=shard_size)
    systems = draw_systems(recipe)
    recipe = recipe.with_systems(systems)
    with tempfile.TemporaryDirectory() as folder:
        totals = _measure_workers(Path(folder), recipe, systems, counts, rounds)
        stages = _measure_stages(Path(folder), recipe, systems)
        bytes_per_image = next(Path(folder).glob("*.tar")).stat().st_size / shard_size
    _print(recipe, stages, totals, bytes_per_image)
    if json_path:
        json_path.write_text(
            json.dumps(
                {
                    "recipe": recipe.to_json(),
                    "stages_ms_per_image": stages,
                    "images_per_second_by_workers": totals,
                    "bytes_per_image": bytes_per_image,
                },
                indent=1,
            )
        )


def _measure_workers(
    folder: Path, recipe: Recipe, systems: Systems, counts: list[int], rounds: int
) -> dict[int, float]:
    """Images per second for each number of workers, the median of the rounds."""
    with ExitStack() as stack:
        pools = {count: stack.enter_context(worker_pool(count)) for count in counts}
        for count, pool in pools.items():
            _time_round(pool, folder, recipe, systems, count)
        seconds: dict[int, list[float]] = defaultdict(list)
        for _ in range(rounds):
            for count, pool in pools.items():
                seconds[count].append(_time_round(pool, folder, recipe, systems, count))
    return {count: count * recipe.shard_size / statistics.median(times) for count, times in seconds.items()}


def _time_round(pool: ProcessPoolExecutor, folder: Path, recipe: Recipe, systems: Systems, count: int) -> float:
    """Seconds in which every worker of a pool writes one shard."""
    start = time.perf_counter()
    futures = [pool.submit(build_shard, folder, recipe, systems, task) for task in shard_tasks(recipe)[:count]]
    wait(futures)
    seconds = time.perf_counter() - start
    for future in futures:
        future.result()
    return seconds


def _measure_stages(folder: Path, recipe: Recipe, systems: Systems) -> dict[str, float]:
    """ms per image of every stage in this process, and of the rest."""
    task = shard_tasks(recipe)[0]
    build_shard(folder, recipe, systems, task)
    spent: dict[str, float] = defaultdict(float)
    with _timed(_STAGES[recipe.kind], spent):
        start = time.perf_counter()
        build_shard(folder, recipe, systems, task)
        total = time.perf_counter() - start
    spent["hashing, writing, the rest"] = total - sum(spent.values())
    return {name: 1000 * seconds / (task.stop - task.first) for name, seconds in spent.items()}


@contextmanager
def _timed(stages: list[tuple[ModuleType, str]], spent: dict[str, float]) -> Iterator[None]:
    """Replace functions where they are called by ones that add up their time."""

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - start
            return result

        return timed

    originals = [(module, name, getattr(module, name)) for module, name in stages]
    for module, name, function in originals:
        setattr(module, name, wrap(name, function))
    try:
        yield
    finally:
        for module, name, function in originals:
            setattr(module, name, function)


def _print(recipe: Recipe, stages: dict[str, float], totals: dict[int, float], bytes_per_image: float) -> None:
    table = Table(
        "stage", "ms per image", title=f"{recipe.kind} {recipe.size} x {recipe.size}, {recipe.points:,} points"
    )
    for name, milliseconds in stages.items():
        table.add_row(name, f"{milliseconds:.3f}")
    table.add_row("sum of the stages, one process", f"{sum(stages.values()):.3f}", style="bold")
    for count, rate in totals.items():
        core = 1000 * count / rate
        million = human_seconds(1e6 / rate)
        table.add_row(f"{count} workers: {rate:,.0f} images/s, a million in {million}", f"{core:.3f} per core")
    first, *others = totals
    for count in others:
        table.add_row(f"{count} workers against {first}", f"{totals[count] / totals[first]:.2f} times")
    table.add_row("bytes in the shard per image", f"{bytes_per_image:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
