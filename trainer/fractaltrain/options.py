"""Options that pre-training and fine-tuning share, and what they ask for."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from fractalshards.console import PATH, quiet_option
from fractalshards.overrides import parse_settings
from fractaltrain.recipes.batch import check_batch
from fractaltrain.recipes.recipe import Recipe, change, scale_lr
from fractaltrain.settings import Amp, OnBadSample, Resume, Running

HEADINGS = {
    "Recipe": "--recipe --epochs --batch-size --lr --scale-lr --set",
    "Processes": "--nproc --workers --amp --accumulate --compile --sync-batchnorm --deterministic",
    "Run": "--out --resume --eval-every --save-every-minutes --keep --seed --pad --on-bad-sample",
}
"""In the help of a command: which of them stand where."""

_Command = TypeVar("_Command", bound=Callable[..., Any])


def running_options(command: _Command) -> _Command:
    """Give a command these options."""
    options = [
        click.option("--epochs", metavar="E", help="Passes over the images.  [default: the recipe's]"),
        click.option("--batch-size", metavar="B", help="Batch of all processes together.  [default: the recipe's]"),
        click.option("--lr", metavar="LR", help="Peak learning rate.  [default: the recipe's, for any batch]"),
        click.option("--scale-lr", is_flag=True, help="Scale the learning rate from the recipe's batch to B."),
        click.option("--set", "changes", multiple=True, metavar="NAME=VALUE", help="Change any figure of the recipe."),
        click.option("--out", type=PATH, help="The run's folder.  [default: runs/...]"),
        click.option("--nproc", type=click.IntRange(1), metavar="N",
                     help="Training processes.  [default: one per GPU, or 1]"),
        click.option("--workers", type=click.IntRange(0, 128), metavar="W",
                     help="Loader processes of each process.  [default: idle cores, 1 to 8, on GPUs; 0 on CPUs]"),
        click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True,
                     help="Seed of everything random."),
        click.option("--amp", type=click.Choice(get_args(Amp)), default="auto", show_default=True,
                     help="Precision; auto: bf16 on GPUs, fp32 on CPUs."),
        click.option("--pad", is_flag=True, help="Use all samples in every epoch: the last batch is filled up."),
        click.option("--on-bad-sample", type=click.Choice(get_args(OnBadSample)), default="stop", show_default=True,
                     help="What a sample that cannot be read does; skip: another takes its place."),
        click.option("--eval-every", type=click.IntRange(1), default=1, show_default=True, metavar="N",
                     help="Evaluate on held-out images after every N-th epoch, and after the last."),
        click.option("--save-every-minutes", type=click.FloatRange(0), default=10.0, show_default=True,
                     help="Checkpoint inside long epochs, too."),
        click.option("--keep", type=click.IntRange(1), default=3, show_default=True, metavar="K",
                     help="Checkpoints that are kept, the newest ones."),
        click.option("--resume", type=click.Choice(get_args(Resume)), default="auto", show_default=True,
                     help="auto: continue the run in the folder, if there is one; never: refuse if there is; "
                     "must: refuse if there is none."),
        click.option("--accumulate", type=click.IntRange(1), default=1, show_default=True, metavar="N",
                     help="Compute each process's batch in N parts, to save memory."),
        click.option("--compile", is_flag=True, help="Run the model through torch.compile."),
        click.option("--sync-batchnorm", is_flag=True, help="Batch norm over all processes together, on GPUs."),
        click.option("--deterministic", is_flag=True, help="The same bits again on the same hardware; slower."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return quiet_option(command)


def resolve(published: Recipe, options: dict[str, Any]) -> Recipe:
    """The recipe with ``--set`` and then the options of its own applied."""
    changes = parse_settings(options["changes"])
    changes |= {name: options[name] for name in ("epochs", "batch_size", "lr") if options[name] is not None}
    recipe = change(published, changes)
    return scale_lr(recipe, published.batch_size) if options["scale_lr"] else recipe


def check_processes(recipe: Recipe, nproc: int | None, options: dict[str, Any]) -> None:
    """What training would refuse, before processes are started, which takes seconds."""
    if nproc is not None:
        check_batch(recipe, nproc, options["accumulate"])


def running_of(recipe: Recipe, options: dict[str, Any], default_out: Path) -> Running:
    """What the options ask for, with a recipe that ``resolve`` gave."""
    same = {field.name: options[field.name] for field in fields(Running) if field.name not in ("recipe", "out")}
    return Running(recipe=recipe, out=options["out"] or default_out, **same)
