"""The command ``fractalgen``: parses options, calls one function per command, prints what came of it."""

import shlex
from dataclasses import fields
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from fractalgen.build import plan_build, run_build
from fractalgen.kinds import KINDS
from fractalgen.recipe import make_recipe
from fractalshards.console import Commands
from fractalshards.errors import UsageError
from fractalshards.human import human_count
from fractalshards.manifest import load_manifest
from fractalshards.overrides import parse_settings, show_value
from fractalshards.workers import available_cores


@click.group(cls=Commands)
@click.version_option(package_name="fractalpretrain", prog_name="fractalgen")
def main() -> None:
    """Render labelled fractal image datasets into WebDataset shards."""


@main.command()
@click.option("--kind", required=True, metavar="|".join(KINDS), help="Family of images.")
@click.option("--n", required=True, type=int, help="Images to train on.")
@click.option("--val", default=0, show_default=True, help="Further images of the same classes, for evaluation.")
@click.option("--classes", type=int, help="Number of classes.  [default: 1000]")
@click.option("--size", type=int, help="Side length in pixels.  [default: by kind; single: 224]")
@click.option("--points", type=int, help="Points of a chaos game.  [default: by kind; single: 100000]")
@click.option("--seed", default=0, show_default=True, help="Seed of everything random.")
@click.option("--shard-size", default=1000, show_default=True, help="Images per shard.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the dataset.  [default: shards/KIND]")
@click.option("--workers", default="all", show_default=True, metavar="all|N", help="Processes that render.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A parameter of the kind; repeatable.")
def build(
    kind: str,
    n: int,
    val: int,
    classes: int | None,
    size: int | None,
    points: int | None,
    seed: int,
    shard_size: int,
    out: Path | None,
    workers: str,
    settings: tuple[str, ...],
) -> None:
    """Build a dataset, or continue one: what is done is skipped.

    Example: fractalgen build --kind single --n 1000000
    """
    recipe = make_recipe(
        kind,
        n,
        val=val,
        classes=classes,
        size=size,
        points=points,
        seed=seed,
        shard_size=shard_size,
        overrides=parse_settings(settings),
    )
    folder = out if out is not None else Path("shards") / kind
    count = _parse_workers(workers)
    plan = plan_build(folder, recipe, count)
    if plan.cost is None:
        click.echo(f"{folder}: nothing to render, {human_count(len(plan.tasks), 'shard')} there already", err=True)
    else:
        done = f", {len(plan.finished):,} of them done" if plan.finished else ""
        click.echo(
            f"{folder}: {n + val:,} images of {recipe.size} x {recipe.size} in "
            f"{human_count(len(plan.tasks), 'shard')}{done}; to render: {plan.cost.samples:,} images, {plan.cost} "
            f"with {human_count(count, 'worker')}",
            err=True,
        )
    run_build(plan, count)
    click.echo(load_manifest(folder).summary())
    click.echo(f"next: fractaltrain pt --shards {shlex.quote(str(folder))}")


@main.command()
def kinds() -> None:
    """List the kinds of images with their parameters and defaults, to be changed with --set.

    Example: fractalgen kinds
    """
    console = Console(soft_wrap=True)
    for name, kind in KINDS.items():
        console.print(f"[bold]{name}[/bold]  {kind.summary}")
        console.print(f"  by default {kind.classes:,} classes, {kind.size} x {kind.size} px, {kind.points:,} points")
        table = Table("--set", "default", "what it is", box=None, padding=(0, 2))
        for field in fields(kind.params):
            table.add_row(field.name, show_value(field.default), field.metadata["help"])
        console.print(table)


def _parse_workers(text: str) -> int:
    if text == "all":
        return available_cores()
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--workers is {text!r}: expected 'all' or a number of at least 1")
    return int(text)
