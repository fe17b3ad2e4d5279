"""Small datasets of every kind, built in this process, or by ``python kind_variants.py OUT SYSTEMS`` in another one."""

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fractalgen import make_recipe
from fractalgen.build import open_folder, plan_build, run_build
from fractalgen.kinds import KINDS, find_kind
from fractalgen.recipe import Recipe
from fractalshards.settings import parse_settings

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
