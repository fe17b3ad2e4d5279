"""Run ``fractalgen`` in this process, list its folders, and build small datasets of every kind.

``python building.py OUT SYSTEMS`` builds those in another process.
"""

import os
import select
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import Popen

from click.testing import CliRunner, Result

from fractalgen import make_recipe
from fractalgen.build import open_folder, plan_build, run_build
from fractalgen.cli import main
from fractalgen.kinds import KINDS, find_kind
from fractalgen.recipe import Recipe
from fractalshards.settings import parse_settings

OPTIONS = "--kind single --n 110 --val 13 --classes 20 --size 32 --points 3000 --shard-size 25"
SMALL = ["build", *OPTIONS.split()]
RECIPE = make_recipe("single", 110, val=13, classes=20, size=32, points=3000, shard_size=25)  # that of SMALL


def run(*arguments: object, environment: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env=environment)


def succeed(*arguments: object, environment: dict[str, str] | None = None) -> Result:
    result = run(*arguments, environment=environment)
    assert result.exit_code == 0, result.output
    return result


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def wait_until(holds: Callable[[], object], process: Popen[str] | None = None) -> None:
    """Wait up to two minutes for a condition that should hold before the process ends."""
    deadline = time.monotonic() + 120
    while not holds():
        assert process is None or process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def children_of(process: int | str = "self") -> list[int]:
    """Return the child processes of all threads of a process, by default of this one."""
    return [int(pid) for path in Path(f"/proc/{process}/task").glob("*/children") for pid in path.read_text().split()]


def workers_of(process: int) -> list[int]:
    """Return the processes that multiprocessing has spawned for a process; /proc cuts no line off, as ps may."""
    return [pid for pid in children_of(process) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def is_running(pid: int) -> bool:
    """Whether a process has not ended; a zombie has, and there may be nobody who looks at it."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    ended = select.select([process], [], [], 0)[0]
    os.close(process)
    return not ended


VARIANTS = {
    **{kind: (kind, ()) for kind in KINDS},
    "fractaldb in colour": ("fractaldb", ("draw=patch-color",)),
    "single of more maps": ("single", ("maps=6,9",)),
    "visualatom of our own": ("visualatom", ("stream=own",)),
}


def small_recipe(kind: str, settings: tuple[str, ...] = (), n: int = 60, classes: int = 12) -> Recipe:
    points = 20_000 if find_kind(kind).points else None
    return make_recipe(
        kind, n, val=8, classes=classes, size=96, points=points, shard_size=40, overrides=overrides_of(kind, settings)
    )


def overrides_of(kind: str, settings: tuple[str, ...] = ()) -> dict[str, str]:
    """Return what lets any number of classes be rendered, and the settings."""
    return parse_settings((*find_kind(kind).preview, *settings))


def build(recipe: Recipe, out: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert run_build(plan_build(open_folder(out, recipe)), pool) == ()


def build_variants(out: Path, systems: Path | None = None) -> None:
    """Build a folder per variant, from the systems that the same variant stores below ``systems``, if given."""
    for name, (kind, settings) in VARIANTS.items():
        (out / name).mkdir(parents=True)
        for file in ("recipe.json", "systems.npz") if systems else ():
            shutil.copy(systems / name / file, out / name)
        build(small_recipe(kind, settings), out / name)


if __name__ == "__main__":
    build_variants(*map(Path, sys.argv[1:]))
