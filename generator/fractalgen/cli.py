"""The command ``fractalgen``: parses options, calls one function per command, prints the result."""

import json
import logging
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from fractalgen.build import open_folder, plan_build, run_build
from fractalgen.categories import read_categories, read_csv, read_csv_folder, search_categories, warn_of_black
from fractalgen.executors import open_executor
from fractalgen.kernels import MAX_POINTS, SIZES
from fractalgen.kernels import fractaldb as kernel
from fractalgen.kinds import KINDS, Kind
from fractalgen.kinds.contours import STREAMS, parameter_table, render_instance
from fractalgen.kinds.kind import show_range
from fractalgen.recipe import Recipe, make_recipe, parse_recipe
from fractalgen.render import check_systems, draw_sheet, draw_systems
from fractalgen.repair import repair_dataset
from fractalshards import console
from fractalshards.console import PATH, PICTURE, Commands, NamedPath, continuable, quiet_option, workers_option
from fractalshards.errors import FractalError, UsageError
from fractalshards.human import human_count, human_list, one_line
from fractalshards.manifest import load_manifest
from fractalshards.png import Indexed, encode_png
from fractalshards.recipe_file import plan_portable, read_portable
from fractalshards.settings import override, parse_settings, parse_slice, show_value
from fractalshards.sheet import save_picture, side_by_side
from fractalshards.storage import check_writable, write_bytes
from fractalshards.systems import Systems, write_systems

_log = logging.getLogger(__name__)

_ALL = "all"
_KIND_HELP = "Kind of images, see 'fractalgen kinds'."
_SIZE = click.option("--size", type=int, help="Side length in pixels.  [default: by kind]")
_POINTS = click.option("--points", type=int, help="Points of each chaos game.  [default: by kind]")
_SEED = click.option("--seed", default=0, help="Random seed.")
_SET = click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Set a parameter of the kind; repeatable."
)
_DATASET = "--kind --n --val --classes --size --points --seed --shard-size --set"
_GIVEN = "--categories --from-csv"
_FRACTALDB = "--params --weight-row --draw --points --flip --mask-seed"
_STREAM = "--kind --category --instance --classes --set"
_PREPARING = "following the published stream", "classes"  # the progress of what a kind computes before it renders


def _dataset_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that describe a dataset, the arguments of ``_make_recipe``."""
    options = (
        click.option("--kind", type=click.Choice([*KINDS]), help=_KIND_HELP),
        click.option("--n", type=int, help="Number of training images.  [default: the published number, if any]"),
        click.option("--val", default=0, help="Number of validation images, of the same classes."),
        click.option("--classes", type=int, help="Number of classes.  [default: 1000]"),
        _SIZE,
        _POINTS,
        _SEED,
        click.option("--shard-size", default=1000, help="Images per shard."),
        click.option("--categories", type=PATH, metavar="FILE.npz",
                     help="FractalDB: categories from 'fractalgen search'."),
        click.option("--from-csv", type=PATH, metavar="DIR", help="FractalDB: categories as published CSV files."),
        _SET,
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _make_recipe(
    kind: str | None,
    classes: int | None,
    categories: Path | None,
    from_csv: Path | None,
    settings: tuple[str, ...],
    **others: Any,
) -> tuple[Recipe, Systems | None]:
    """Make a recipe from the options that describe a dataset; return it with the systems that they name, if any."""
    if kind is None:
        raise UsageError("--kind is missing; 'fractalgen kinds' lists all kinds")
    given = None
    if path := categories or from_csv:
        if categories and from_csv:
            raise UsageError("--categories and --from-csv: give only one of them")
        if kind != "fractaldb":
            raise UsageError(f"{path}: holds categories of FractalDB, but --kind is {kind!r}")
        found = read_categories(path) if categories else read_csv_folder(path)
        classes = len(found) if classes is None else classes
        if classes > len(found):
            raise UsageError(f"--classes is {classes}, but {path} holds only {len(found)} categories: lower it")
        given = found[:classes]
        warn_of_black(given, path)
    made = make_recipe(kind, classes=classes, overrides=parse_settings(settings), **others)
    if kind in STREAMS and made.size < KINDS[kind].size:
        _log.warning("curves do not shrink with --size, and leave many small images empty; resize in training instead")
    return made, given


@click.group(cls=Commands)
@click.version_option(package_name="fractalpretrain", prog_name="fractalgen")
def main() -> None:
    """Render labelled fractal image datasets into WebDataset shards."""


@main.command(
    groups={
        "Dataset": f"{_DATASET} --out",
        "Dataset, from files": f"--recipe {_GIVEN}",
        "Work": "--workers --slice --executor --scheduler",
    }
)
@_dataset_options
@click.option("--recipe", "recipe_file", type=PATH, metavar="FILE",
              help="Portable recipe, from 'fractalgen recipe' or 'fractalshards recipe'.")  # fmt: skip
@click.option("--out", type=PATH, help="Dataset folder.  [default: shards/KIND]")
@click.option("--executor", type=click.Choice(["local", "dask"]), default="local",
              help="Where to render: in local processes or on a Dask cluster.")  # fmt: skip
@click.option("--scheduler", metavar="tcp://HOST:PORT", help="Address of the Dask scheduler.")
@click.option("--slice", "slice_", metavar="I/K|auto", help="Build every K-th shard, from the I-th on; for job arrays.")
@workers_option
@quiet_option
@click.pass_context
def build(
    context: click.Context,
    /,
    recipe_file: Path | None,
    out: Path | None,
    executor: str,
    scheduler: str | None,
    slice_: str | None,
    workers: int,
    **dataset: Any,
) -> None:
    """Build a dataset, or continue a build: finished shards are skipped.

    Example: fractalgen build --kind single --n 1000000
    """
    portable = None
    given: Systems | None
    if recipe_file is not None:
        _refuse_beside(context, "--recipe", f"{_DATASET} {_GIVEN}")
        portable = read_portable(recipe_file)
        recipe, given = parse_recipe(portable.recipe, portable.recipe_digest, str(recipe_file)), portable.systems
    else:
        recipe, given = _make_recipe(**dataset)
    folder = out if out is not None else Path("shards") / recipe.kind
    chosen = parse_slice(slice_, os.environ) if slice_ is not None else None
    if (executor == "dask") != bool(scheduler):
        raise UsageError("--executor dask and --scheduler tcp://HOST:PORT, from 'dask scheduler', need each other")
    if scheduler and _is_given(context, "workers"):
        raise UsageError("--workers is given, but a Dask cluster has its own workers: leave it out")
    with continuable(folder), open_executor(workers, scheduler) as (pool, count):
        with console.progress(*_PREPARING) as on_progress:
            plan = plan_build(open_folder(folder, recipe, given, on_progress), chosen, on_progress)
        console.note(f"{folder}: {plan.describe(chosen, count, scheduler)}")
        with console.progress("rendering", "images") as on_progress:
            missing = run_build(plan, pool, on_progress)
    if missing:
        left = f"{human_count(len(missing), 'shard')} of other slices"
        click.echo(f"{folder}: {chosen} is done; still missing before the manifest can be written: {left}")
        return
    manifest = load_manifest(folder)
    if portable and (differing := portable.differing_shards(manifest.splits)):
        names = human_list(differing)
        raise FractalError(f"{folder}: {names} differ from {recipe_file}; install the fractalpretrain that made it")
    if portable and portable.shards is None:
        console.note(f"note: {recipe_file} was made without a build, so it has no digests to compare the images with")
    click.echo(manifest.summary())
    console.next_step("fractaltrain pt --shards", folder)


@main.command(groups={"Dataset": _DATASET, "Dataset, from files": _GIVEN})
@_dataset_options
@click.option("--out", type=PATH, help="File to write.  [default: standard output]")
def recipe(out: Path | None, **dataset: Any) -> None:
    """Write the portable recipe of a dataset without building it, for 'fractaltrain pt --render'.

    Example: fractalgen recipe --kind single --n 1000000 > single.json
    """
    made, given = _make_recipe(**dataset)
    with console.progress(*_PREPARING) as on_progress:
        systems = draw_systems(made, on_progress) if given is None else given
    check_systems(made, systems, f"recipe of kind {made.kind}")
    text = plan_portable(made.with_systems(systems).to_json(), made.family.label_type, systems)
    console.write_recipe(text, out, "fractaltrain pt --render")


@main.command()
@click.argument("folder", metavar="DIR", type=PATH)
@workers_option
@quiet_option
def repair(folder: Path, workers: int) -> None:
    """Verify a dataset, and render damaged and missing shards again.

    Example: fractalgen repair shards/single
    """
    bars = console.progress(*_PREPARING), console.progress("repairing", "images")
    with continuable(folder), open_executor(workers) as (executor, _), bars[0] as on_prepare, bars[1] as on_progress:
        problems, rendered, extra = repair_dataset(folder, executor, on_progress, on_prepare)
    for problem in problems:
        click.echo(one_line(f"damaged: {folder}/{problem}"))
    if rendered:
        click.echo(f"rendered again: {human_list(rendered)}")
    if extra:
        raise FractalError(f"{folder}: the dataset is sound, but {human_list(extra)} do not belong to it; remove them")
    click.echo(f"sound: {load_manifest(folder).summary()}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def kinds(as_json: bool) -> None:
    """List the kinds of images and their --set parameters.

    Example: fractalgen kinds
    """
    if as_json:
        about = ("name", "summary", "n", "classes", "size", "points", "label_type")
        listed = [{name: getattr(kind, name) for name in about} for kind in KINDS.values()]
        click.echo(json.dumps([one | {"parameters": _parameters(KINDS[one["name"]])} for one in listed], indent=1))
        return
    screen = Console(soft_wrap=True)
    for name, kind in KINDS.items():
        counts = {"images": kind.n, "classes": kind.classes, "points": kind.points}
        shown = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
        screen.print(f"[bold]{name}[/bold]  {kind.summary}\n  by default {shown}, {kind.size} x {kind.size} px")
        table = Table("--set", "default", "range", "description", box=None, padding=(0, 2))
        for parameter in _parameters(kind):
            table.add_row(*map(show_value, parameter.values()))
        screen.print(table)


@main.command(groups={"Images": "--kind --size --points --seed --set", "Sheet": "--classes --per-class --tile --out"})
@click.option("--kind", required=True, type=click.Choice([*KINDS, _ALL]), help=_KIND_HELP)
@_SIZE
@_POINTS
@_SEED
@_SET
@click.option("--classes", default=16, type=click.IntRange(1, 1000), help="Classes to show, one row each.")
@click.option("--per-class", default=8, type=click.IntRange(1, 100), help="Images per row.")
@click.option("--tile", default=96, type=click.IntRange(8, 1024), help="Side of an image on the sheet in pixels.")
@click.option("--out", required=True, type=PICTURE, help="Image file to write: .png or .jpg.")
def preview(
    kind: str, settings: tuple[str, ...], classes: int, per_class: int, tile: int, out: Path, **others: Any
) -> None:
    """Draw a contact sheet of a dataset without building it; --kind all shows all kinds side by side.

    Example: fractalgen preview --kind single --set blur_probability=0 --out sheet.png
    """
    overrides = parse_settings(settings)
    if kind == _ALL and overrides:
        raise UsageError("--set changes one kind, but --kind is 'all'")
    recipes = []
    for one in KINDS.values() if kind == _ALL else (KINDS[kind],):
        changed = {**parse_settings(one.preview), **overrides}
        given = {**others, "points": None} if kind == _ALL and not one.points else others
        recipes.append(make_recipe(one.name, classes, classes=classes, overrides=changed, **given))
    picture = side_by_side([draw_sheet(recipe, per_class, tile) for recipe in recipes])
    save_picture(picture, out)
    click.echo(f"{out}: {picture.width} x {picture.height} pixels")


@main.command(groups={"FractalDB": _FRACTALDB, "Published streams": _STREAM, "Image": "--size --out"})
@click.option("--params", type=PATH, metavar="FILE.csv", help="A category: one row a,b,c,d,e,f,p per map.")
@click.option("--weight-row", default=2, type=click.IntRange(0, 24), help="Weight row; 2 is the unchanged category.")
@click.option("--draw", default="patch-gray", type=click.Choice(kernel.DRAWS), help="Drawing style.")
@click.option("--points", default=200_000, type=click.IntRange(1, MAX_POINTS), help="Points to draw.")
@click.option("--flip", default=0, type=click.IntRange(0, 3), help="0 none, 1 top-bottom, 2 left-right, 3 both.")
@click.option("--mask-seed", default=0, type=int, help="Seed of the patch masks (Python's random).")
@click.option("--kind", type=click.Choice([*STREAMS]), help=_KIND_HELP)
@click.option("--category", type=int, metavar="C", help="Class of the image, from 0.")
@click.option("--instance", type=int, metavar="I", help="Image of the class, from 0.")
@click.option("--classes", default=1000, type=click.IntRange(1), help="Classes of the stream.")
@_SET
@click.option("--size", type=click.IntRange(SIZES.start, SIZES.stop - 1), help="Side in pixels.  [default: by kind]")
@click.option("--out", required=True, type=NamedPath(".png"), metavar="IMG.png", help="Image file to write.")
@quiet_option
@click.pass_context
def render(
    context: click.Context,
    /,
    params: Path | None,
    weight_row: int,
    draw: kernel.Draw,
    points: int,
    flip: int,
    mask_seed: int,
    kind: str | None,
    category: int | None,
    instance: int | None,
    classes: int,
    settings: tuple[str, ...],
    size: int | None,
    out: Path,
) -> None:
    """Render one published image of FractalDB, VisualAtom or RCDB, pixel for pixel.

    Example: fractalgen render --kind visualatom --category 7 --instance 0 --out image.png
    """
    if params is not None:
        _refuse_beside(context, "--params", _STREAM)
        masks = kernel.published_masks(mask_seed, points) if kernel.is_patch(draw) else None
        weights, side = kernel.weight_rows()[weight_row], size or KINDS["fractaldb"].size
        indices = kernel.render(read_csv(params), weights, side, points, draw, masks)
        image = Indexed(kernel.flip(indices, flip), kernel.palette(draw))
    else:
        _refuse_beside(context, "--kind", _FRACTALDB)
        if kind is None:
            raise UsageError("--params is missing, or --kind with --category and --instance")
        if category is None or instance is None:
            raise UsageError(f"--kind {kind} needs --category and --instance, the class and the image")
        side = size or KINDS[kind].size
        stream = override(STREAMS[kind](), parse_settings(settings))
        with console.progress(*_PREPARING) as on_progress:
            image = render_instance(stream, side, classes, category, instance, on_progress)
    write_bytes(out, encode_png(image.rgb()))
    click.echo(f"{out}: {side} x {side} pixels")


@main.command(groups={"Stream": "--kind --classes --seed --set", "File": "--out"})
@click.option("--kind", required=True, type=click.Choice([*STREAMS]), help=_KIND_HELP)
@click.option("--classes", default=1000, type=click.IntRange(1), help="Number of classes.")
@_SEED
@_SET
@click.option("--out", required=True, type=PATH, metavar="FILE.csv", help="File to write.")
@quiet_option
def parameters(kind: str, classes: int, seed: int, settings: tuple[str, ...], out: Path) -> None:
    """Write the parameters of all classes of VisualAtom or RCDB, one row each.

    Example: fractalgen parameters --kind visualatom --out parameters.csv
    """
    recipe = make_recipe(kind, classes, classes=classes, seed=seed, overrides=parse_settings(settings))
    with console.progress(*_PREPARING) as on_progress:
        systems = draw_systems(recipe, on_progress)
    write_bytes(out, parameter_table(systems))
    click.echo(f"{out}: {len(systems):,} classes")


@main.command()
@click.option("--classes", default=1000, help="Categories to find.")
@click.option("--seed", default=1, help="Random seed; the published search used 1.")
@click.option("--fill-rate", default=0.2, help="Minimum share of pixels that a category fills.")
@click.option("--out", required=True, type=PATH, metavar="FILE.npz", help="File to write.")
@workers_option
@quiet_option
def search(classes: int, seed: int, fill_rate: float, out: Path, workers: int) -> None:
    """Search for FractalDB categories; the same seed finds those of the published search, bit for bit.

    Example: fractalgen search --classes 2000 --out categories.npz
    """
    if out.is_dir():
        raise UsageError(f"--out is {out}: expected the name of a file")
    check_writable(out.parent)
    with console.progress("searching", "categories") as on_progress:
        found = search_categories(classes, seed, fill_rate, workers, on_progress)
    console.note(f"tried {found[-1].candidate:,} candidates")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_systems(out, [one.category for one in found])
    click.echo(f"{out}: {len(found):,} categories")
    console.next_step("fractalgen build --kind fractaldb --n N --categories", out)


def _refuse_beside(context: click.Context, option: str, others: str) -> None:
    """Refuse other options, as in ``--a --b``, beside one that determines them."""
    for parameter in context.command.params:
        name = parameter.opts[0]
        if name in others.split() and _is_given(context, parameter.name or ""):
            raise UsageError(f"{name} cannot be combined with {option}, which determines it: leave it out")


def _is_given(context: click.Context, name: str) -> bool:
    """Return whether a parameter was given on the command line."""
    return context.get_parameter_source(name) is not ParameterSource.DEFAULT


def _parameters(kind: Kind) -> list[dict[str, Any]]:
    return [
        {"name": one.name, "default": one.default, "range": show_range(kind.params, one), "help": one.metadata["help"]}
        for one in fields(kind.params)
    ]
