"""Options that pre-training and fine-tuning share, and what they ask for."""

import os
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from fractalshards.console import PATH, Commands, is_quiet, note, quiet_option
from fractalshards.errors import FractalError, UsageError, needs_extra
from fractalshards.human import human_count, human_list, parse_bytes
from fractalshards.manifest import find_manifest
from fractalshards.remote.stores import parse_location
from fractalshards.settings import parse_settings
from fractalshards.slices import parse_slice
from fractaltrain.beginning import ends_at_once
from fractaltrain.compare import FILES, Comparison, collect_runs, write_comparison
from fractaltrain.config import (
    WINDOW,
    Amp,
    Caching,
    Evaluation,
    Finetuning,
    Freeze,
    OnBadSample,
    Pretraining,
    Resume,
    Running,
    Start,
    finetuning_folder,
    pretraining_folder,
)
from fractaltrain.data.images import FOLDER_PREFIX, NAMES, SHARDS_PREFIX, DataChoice, find_data, is_data
from fractaltrain.recipes import FT_RECIPES, PT_RECIPES
from fractaltrain.recipes.recipe import TrainRecipe, change, check_batch, scale_lr
from fractaltrain.run_folder import trained_model
from fractaltrain.run_study import check_models, describe_study, find_digests, missing_datasets, run_study
from fractaltrain.study import plan_study, read_study, write_plan

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


def resolve(published: TrainRecipe, options: dict[str, Any]) -> TrainRecipe:
    """The recipe with ``--set`` and then the options of its own applied."""
    recipe = change(published, changed_fields(options))
    return scale_lr(recipe, published.batch_size) if options["scale_lr"] else recipe


def changed_fields(options: dict[str, Any]) -> dict[str, str]:
    """The fields of the recipe that a command line sets, as text."""
    named = {name: options[name] for name in ("epochs", "batch_size", "lr") if options[name] is not None}
    return parse_settings(options["changes"]) | named


def check_processes(recipe: TrainRecipe, nproc: int | None, options: dict[str, Any]) -> None:
    """What training would refuse, before processes are started, which takes seconds."""
    if nproc is not None:
        check_batch(recipe, nproc, options["accumulate"])


def running_of(recipe: TrainRecipe, options: dict[str, Any], default_out: Path) -> Running:
    """What the options ask for, with a recipe that ``resolve`` gave."""
    same = {field.name: options[field.name] for field in fields(Running) if field.name not in ("recipe", "out")}
    return Running(recipe=recipe, out=options["out"] or default_out, **same)


_DEFAULT_MODEL = "deit_small_patch16_224"
_SCRATCH = "none"
_CACHE_SIZE = "20GB"

_Choice = TypeVar("_Choice")


@click.group(cls=Commands)
@click.version_option(package_name="fractalpretrain", prog_name="fractaltrain")
def main() -> None:
    """Pre-train vision models on fractals, fine-tune them on real images."""


@main.command(
    groups={
        "Data and model": "--shards --model --image-size --window --cache-dir --cache-size --nodes-split",
        **HEADINGS,
    }
)
@click.option("--shards", required=True, metavar="DIR|URL", help="Folder of a dataset, here or elsewhere (s3://, ...).")
@click.option("--model", default=_DEFAULT_MODEL, show_default=True, help="resnet50, or any name timm knows.")
@click.option("--recipe", type=click.Choice(sorted(PT_RECIPES)), default="anderson", show_default=True,
              help="Published recipe to follow.")  # fmt: skip
@click.option(
    "--image-size",
    type=click.IntRange(8, 4096),
    metavar="PX",
    help="What the model sees.  [default: as stored; 224 where the recipe crops]",
)
@click.option("--window", type=click.IntRange(1), default=WINDOW, show_default=True, help="Shards shuffled together.")
@click.option(
    "--cache-dir",
    type=PATH,
    metavar="DIR",
    help="Keep shards of a URL below this folder of the machine.  [default: $TMPDIR or ~/.cache]",
)
@click.option("--cache-size", metavar="SIZE", help="At most so many bytes of them.  [default: 20GB]")
@click.option(
    "--nodes-split", is_flag=True, help="Each machine reads its own part of an epoch's shards, where none is shared."
)
@running_options
def pt(
    shards: str,
    model: str,
    recipe: str,
    window: int,
    image_size: int | None,
    cache_dir: Path | None,
    cache_size: str | None,
    nodes_split: bool,
    nproc: int | None,
    **options: Any,
) -> None:
    """Pre-train on a dataset of shards. The same command continues a run that was stopped.

    SIGTERM and SIGUSR1 save between two steps and end the run with exit code 75: run the same command again.

    Example: fractaltrain pt --shards shards/single --model resnet50
    """
    figures = resolve(PT_RECIPES[recipe], options)
    _check_install("training")
    check_processes(figures, nproc, options)
    caching = _caching(shards, cache_dir, cache_size)
    if caching is None:
        find_manifest(Path(parse_location(shards).root))
    choice = Pretraining(
        changed=frozenset(changed_fields(options)),
        running=running_of(figures, options, default_out=pretraining_folder(shards, model, figures)),
        shards=shards,
        caching=caching,
        model=model,
        image_size=image_size,
        window=window,
        nodes_split=nodes_split,
    )
    _launch(_pretrain, choice, nproc)


def _pretrain(choice: Pretraining) -> None:
    with ends_at_once(), needs_extra("train", "training"):
        from fractaltrain.pretrain import pretrain
    pretrain(choice)


def _check_data(context: click.Context, parameter: click.Parameter, name: str) -> str:
    if is_data(name):
        return name
    raise click.BadParameter(f"{name!r} is none of {', '.join(NAMES)}, {FOLDER_PREFIX}PATH, {SHARDS_PREFIX}PATH")


def _data_options(command: _Command) -> _Command:
    command = click.option("--data", required=True, callback=_check_data, metavar="DATA",
                           help="digits, cifar10, cifar100, imagefolder:PATH (PATH/train/CLASS, PATH/val/CLASS), or "
                           "shards:PATH, with a held-out split.")(command)  # fmt: skip
    return click.option("--data-dir", type=PATH, default=Path("data"), show_default=True,
                        help="Where CIFAR's archives are, or go.")(command)  # fmt: skip


@main.command(
    groups={
        "Data and model": "--weights --model --freeze --data --data-dir --per-class --subset-seed --image-size",
        **HEADINGS,
    }
)
@click.option("--weights", required=True, metavar="RUN|none|timm",
              help="Folder of a pre-training run; none: from scratch; timm: the weights it publishes.")  # fmt: skip
@_data_options
@click.option("--model", help=f"With --weights none or timm only.  [default: {_DEFAULT_MODEL}]")
@click.option("--recipe", type=click.Choice(sorted(FT_RECIPES)),
              help="Published recipe to follow.  "
              "[default: anderson; with --weights none: anderson-scratch]")  # fmt: skip
@click.option("--image-size", type=click.IntRange(8, 4096), metavar="PX",
              help="What the model sees.  [default: the pre-training's; 224 from scratch]")  # fmt: skip
@click.option("--freeze", type=click.Choice(get_args(Freeze)), help="Train the new classifier only: a linear probe.")
@click.option("--per-class", type=click.IntRange(1), metavar="N", help="Train on N images of every class only.")
@click.option("--subset-seed", type=click.IntRange(0), default=0, show_default=True, help="Chooses those images.")
@running_options
def ft(
    weights: str,
    data: str,
    model: str | None,
    recipe: str | None,
    freeze: Freeze | None,
    per_class: int | None,
    subset_seed: int,
    data_dir: Path,
    image_size: int | None,
    nproc: int | None,
    **options: Any,
) -> None:
    """Fine-tune a pre-trained model on real images, or train one from scratch to compare with.

    The accuracy on held-out images after the last epoch is the figure; result.json in the run's folder has it.

    SIGTERM and SIGUSR1 save between two steps and end the run with exit code 75: run the same command again.

    Example: fractaltrain ft --weights runs/single-resnet50-anderson --data cifar100
    """
    start: Start = None if weights == _SCRATCH else "timm" if weights == "timm" else Path(weights)
    if isinstance(start, Path) and model is not None:
        raise UsageError("--model goes with --weights none or timm only; a run knows its model")
    if start is None and freeze is not None:
        raise UsageError("--freeze goes with weights that were trained; --weights none has none")
    figures = resolve(FT_RECIPES[recipe or ("anderson" if start else "anderson-scratch")], options)
    _check_install("training")
    check_processes(figures, nproc, options)
    find_data(data)
    if isinstance(start, Path):
        trained_model(start)
    choice = DataChoice(name=data, per_class=per_class, subset_seed=subset_seed, folder=data_dir)
    folder = finetuning_folder(start, model or _DEFAULT_MODEL, choice, figures, freeze)
    finetuning = Finetuning(
        running=running_of(figures, options, default_out=folder),
        weights=start,
        model=model or _DEFAULT_MODEL,
        data=choice,
        image_size=image_size,
        freeze=freeze,
    )
    _launch(_finetune, finetuning, nproc)


def _finetune(choice: Finetuning) -> None:
    with ends_at_once(), needs_extra("train", "training"):
        from fractaltrain.finetune import finetune
    finetune(choice)


def _launch(entry: Callable[[_Choice], None], choice: _Choice, nproc: int | None) -> None:
    """Run a command in its processes. Only they import what it needs: a launcher that waits for them does not."""
    with ends_at_once(), needs_extra("train", "training"):
        from fractaltrain.distributed import launch
    launch(entry, choice, nproc)


def _caching(shards: str, folder: Path | None, size: str | None) -> Caching | None:
    """How a dataset is cached; one on this machine is not."""
    if parse_location(shards).scheme != "file":
        return Caching(folder, parse_bytes(size or _CACHE_SIZE, "--cache-size"))
    if folder is not None or size is not None:
        raise UsageError("--cache-dir and --cache-size go with the URL of a dataset elsewhere only")
    return None


def _check_install(purpose: str) -> None:
    """Refuse what cannot run before anything else, but without importing PyTorch, which takes seconds."""
    with needs_extra("train", purpose):
        if find_spec("torch") is None:
            raise ModuleNotFoundError(name="torch")


@main.command("eval")
@click.option("--weights", required=True, type=PATH, metavar="RUN", help="Folder of a run.")
@_data_options
@click.option("--out", type=PATH, metavar="DIR",
              help="Where the report goes.  [default: eval-DATA in the run's folder]")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True, metavar="B",
              help="Images at a time; it changes nothing but memory and speed.")  # fmt: skip
@quiet_option
def evaluate(weights: Path, data: str, data_dir: Path, out: Path | None, batch_size: int) -> None:
    """Evaluate a trained run on held-out images: accuracy, by class too, and a confusion matrix.

    Where images show several classes each: mean average precision, F1, and average precision by class.

    Example: fractaltrain eval --weights runs/digits-from-single --data digits
    """
    _check_install("evaluation")
    trained_model(weights)
    find_data(data)
    choice = DataChoice(name=data, per_class=None, subset_seed=0, folder=data_dir)
    _launch(_evaluate, Evaluation(weights, choice, out, batch_size), nproc=1)


def _evaluate(choice: Evaluation) -> None:
    with ends_at_once(), needs_extra("train", "evaluation"):
        from fractaltrain.evaluate_run import evaluate_run
    evaluate_run(choice)


@main.command()
@click.argument("run", type=PATH)
@click.option("--out", required=True, type=PATH, metavar="FILE", help="A .safetensors file.")
def export(run: Path, out: Path) -> None:
    """Write the weights of a run as a file that timm.create_model loads.

    Example: fractaltrain export runs/single --out model.safetensors
    """
    with ends_at_once(), needs_extra("train", "export"):
        from fractaltrain.export import export_run
    exported = export_run(run, out)
    click.echo(f"{exported.origin}: {exported.path}")
    click.echo(f"import timm; {exported.line}")


@main.command()
@click.argument("file", type=PATH, metavar="STUDY.toml")
@click.option("--out", type=PATH, help="The study's folder.  [default: runs/NAME]")
@click.option("--dry-run", is_flag=True, help="List all runs with their state and command line; start none.")
@click.option(
    "--slice", "slice_", metavar="I/K|auto", help="Every K-th pre-training with its fine-tunings: for job arrays."
)
@click.option("--data-dir", type=PATH, default=Path("data"), show_default=True,
              help="Where CIFAR's archives are, or go.")  # fmt: skip
@click.option(
    "--nproc", type=click.IntRange(1), metavar="N", help="Processes of each run.  [default: one per GPU, or 1]"
)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, metavar="N",
              help="Runs at the same time; on CPUs they share the cores.")  # fmt: skip
@quiet_option
def study(
    file: Path, out: Path | None, dry_run: bool, slice_: str | None, data_dir: Path, nproc: int | None, jobs: int
) -> None:
    """Run a grid of pre-training sets, models and fine-tuning sets. Finished runs are skipped, stopped ones continue.

    Example: fractaltrain study studies/mini.toml --dry-run
    """
    part = parse_slice(slice_, os.environ) if slice_ is not None else None
    asked = read_study(file)
    folder = out or Path("runs") / str(asked.study.name)
    plan = plan_study(asked, find_digests(asked))
    runs = [run for group in (part.of(plan.groups()) if part else plan.groups()) for run in group]
    try:
        check_models(plan, asked.study.image_size)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    problems = list(missing_datasets(asked))
    if dry_run:
        for line in describe_study(runs, plan, folder, data_dir):
            click.echo(line)
        for problem in problems:
            note(f"note: {problem}")
        return
    if problems:
        raise FractalError(f"{file}: {'; '.join(problems)}")
    write_plan(plan, folder)
    missing = run_study(runs, plan, folder, data_dir, nproc, jobs, is_quiet())
    comparison = collect_runs([folder])
    if comparison.runs:
        _show_comparison(comparison, folder)
    if missing:
        raise FractalError(f"{folder}: {human_count(len(missing), 'run')} missing: {human_list(missing)}")


@main.command()
@click.argument("runs", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option("--out", type=PATH, required=True, metavar="DIR", help="Folder of the tables.")
def compare(runs: tuple[Path, ...], out: Path) -> None:
    """Compare fine-tuning runs, or folders of them: table.csv, table.md and figure.png, mean and spread over seeds.

    Example: fractaltrain compare runs/mini --out runs/mini
    """
    comparison = collect_runs(runs)
    if not comparison.runs:
        raise FractalError(f"{human_list([str(run) for run in runs])}: no finished fine-tuning run; check the path")
    _show_comparison(comparison, out)


def _show_comparison(comparison: Comparison, out: Path) -> None:
    click.echo(write_comparison(comparison, out))
    note(f"{out}: {', '.join(FILES)}")


if __name__ == "__main__":
    main()
