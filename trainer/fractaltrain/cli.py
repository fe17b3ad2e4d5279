"""The command ``fractaltrain``: reads options, checks what can be checked without PyTorch, and starts the work."""

import atexit
import gc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fractalshards.console import PATH, Commands, is_quiet, note, progress, quiet_option, show_logs
from fractalshards.errors import FractalError, UsageError, needs_extra
from fractalshards.human import human_count, human_list, one_line, parse_bytes
from fractalshards.manifest import TRAINING, load_manifest
from fractalshards.recipe_file import read_portable
from fractalshards.settings import nearest, parse_settings, parse_slice
from fractalshards.webdataset import WebDatasetOptions, find_dataset
from fractaltrain.compare import FILES, Comparison, collect_runs, write_comparison
from fractaltrain.config import (
    WINDOW,
    Amp,
    DatasetConfig,
    EvalConfig,
    Freeze,
    ImagesConfig,
    ModelArgument,
    ModelConfig,
    OnBadSample,
    Resume,
    RunConfig,
    TrainConfig,
    Weights,
    finetuning_folder,
)
from fractaltrain.data.images import DATA_NAMES, find_data, is_data
from fractaltrain.recipes import FT_RECIPES, PT_RECIPES, for_dataset
from fractaltrain.recipes.recipe import TrainRecipe, change, scale_lr
from fractaltrain.run_folder import LOCK, hold_folder, load_settings
from fractaltrain.run_study import check_models, describe_study, find_datasets, run_study
from fractaltrain.stream.order import check_batch
from fractaltrain.study import plan_study, read_study, write_plan

_DEFAULT_MODEL = "deit_small_patch16_224"
_ALL_CLASSES = 99  # with more classes, eval prints only the best and the worst
_HEADINGS = {"samples": "images", "top1": "top-1", "top5": "top-5", "average_precision": "average precision"}

_Config = TypeVar("_Config")

_Options = dict[str, list[click.Option]]


def _option(*names: str, **attributes: Any) -> click.Option:
    return click.Option([*names], **attributes)


_MODEL_ARG = _option("--model-arg", "model_args", multiple=True, metavar="NAME=VALUE",
                     help="Argument of timm's model, such as patch_size=4; repeatable.")  # fmt: skip
_TAR_OPTIONS = [
    _option("--label-key", metavar="FIELD",
            help="For tars of other programs: the field of KEY.json with the class index.  [default: read KEY.cls]"),
    _option("--split", metavar="train=PATTERN,val=PATTERN",
            help="For tars of other programs: file names of each split.  [default: by info file or names]"),
]  # fmt: skip
_IMAGE_OPTIONS = [
    _option("--data", required=True, metavar="DATA", callback=lambda _context, _option, name: _check_data(name),
            help="digits, a published dataset (cifar10, cifar100, fashion-mnist, svhn, flowers102, ...), "
            "imagefolder:PATH (PATH/train/CLASS, PATH/val/CLASS), or shards:PATH with a val split."),
    _option("--data-dir", type=PATH, default=Path("data"),
            help="Folder of published datasets; missing ones are downloaded."),
    *_TAR_OPTIONS,
]  # fmt: skip
_RUN_OPTIONS: _Options = {
    "Recipe": [
        _option("--epochs", metavar="E", help="Number of epochs.  [default: the recipe's]"),
        _option("--batch-size", metavar="B", help="Global batch size, over all processes.  [default: the recipe's]"),
        _option("--lr", metavar="LR", help="Peak learning rate.  [default: the recipe's, whatever the batch size]"),
        _option("--scale-lr", is_flag=True, help="Scale the learning rate from the recipe's batch size to B."),
        _option("--set", "changes", multiple=True, metavar="NAME=VALUE", help="Change any value of the recipe."),
    ],
    "Processes": [
        _option("--nproc", type=click.IntRange(1), metavar="N",
                help="Training processes.  [default: one per GPU, or 1]"),
        _option("--workers", type=click.IntRange(0, 128), metavar="W",
                help="Data loader workers per training process.  [default: idle cores, 1 to 8, on GPUs; 0 on CPUs]"),
        _option("--amp", type=click.Choice(get_args(Amp)), default="auto",
                help="Precision; auto: bf16 on GPUs, fp32 on CPUs."),
        _option("--accumulate", type=click.IntRange(1), default=1, metavar="N",
                help="Accumulate gradients over N parts of each process's batch, to save memory."),
        _option("--compile", is_flag=True, help="Run the model through torch.compile."),
        _option("--sync-batchnorm", is_flag=True, help="Synchronise batch norm across processes; GPUs only."),
        _option("--deterministic", is_flag=True, help="Make results bit-identical on the same hardware; slower."),
    ],
    "Run": [
        _option("--out", type=PATH, help="Folder of the run.  [default: runs/...]"),
        _option("--resume", type=click.Choice(get_args(Resume)), default="auto",
                help="auto: continue the run in the folder, if there is one; never: refuse if there is one; must: "
                "refuse if there is none."),
        _option("--eval-every", type=click.IntRange(1), default=1, metavar="N",
                help="Evaluate the val split after every N-th epoch, and after the last."),
        _option("--save-every-minutes", type=click.FloatRange(0), default=10.0,
                help="Minutes between checkpoints within an epoch."),
        _option("--keep", type=click.IntRange(1), default=3, metavar="K", help="Number of checkpoints to keep."),
        _option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Random seed."),
        _option("--pad", is_flag=True, help="Fill up the last batch, so that every sample is used."),
        _option("--on-bad-sample", type=click.Choice(get_args(OnBadSample)), default="stop",
                help="Unreadable samples: stop, or skip them and use others instead."),
    ],
}  # fmt: skip


def _grouped(options: _Options) -> dict[str, Any]:
    """Return the arguments of ``main.command`` for these options, each under its heading in the help."""
    return {
        "params": [option for group in options.values() for option in group],
        "groups": {heading: " ".join(option.opts[0] for option in group) for heading, group in options.items()},
    }


@click.group(cls=Commands)
@click.version_option(package_name="fractalpretrain", prog_name="fractaltrain")
def main() -> None:
    """Pre-train vision models on fractals, fine-tune them on real images."""
    os.environ["MPLBACKEND"] = "agg"  # figures are only saved; in notebooks it names a package that may be missing here
    atexit.register(gc.freeze)  # Python would search the objects of PyTorch for cycles at exit, for over a second


_PT_OPTIONS: _Options = {
    "Data and model": [
        _option("--shards", metavar="DIR|URL", help="Folder or URL (s3://, ...) of a dataset."),
        _option("--render", metavar="FILE.json",
                help="Instead of --shards: render the samples of a recipe, from 'fractalgen recipe', while training."),
        _option("--fresh", is_flag=True, help="With --render: new images in every epoch."),
        _option("--model", default=_DEFAULT_MODEL, help="resnet50, or the name of any timm model."),
        _MODEL_ARG,
        _option("--image-size", type=click.IntRange(8, 4096), metavar="PX",
                help="Size of the images that the model sees.  [default: as stored; 224 where the recipe crops]"),
        _option("--window", type=click.IntRange(1), default=WINDOW, help="Number of shards to shuffle together."),
        _option("--cache-dir", type=PATH, metavar="DIR",
                help="Folder for the shards of a URL, and for --memory.  [default: $TMPDIR or ~/.cache]"),
        _option("--cache-size", default="20GB", metavar="SIZE", help="Disk space for the shards of a URL."),
        _option("--memory", is_flag=True,
                help="Decode or render all images once, into memory shared by all processes of a machine."),
        _option("--memory-size", default="8GB", metavar="SIZE", help="Limit for --memory."),
        _option("--nodes-split", is_flag=True, help="Give each machine its own part of an epoch's shards."),
        *_TAR_OPTIONS,
    ],
    **_RUN_OPTIONS,
    "Recipe": [
        _option("--recipe", type=click.Choice(sorted(PT_RECIPES)), default="anderson", help="Published recipe."),
        *_RUN_OPTIONS["Recipe"],
    ],
}  # fmt: skip


@main.command(**_grouped(_PT_OPTIONS))
@quiet_option
def pt(nproc: int | None, **options: Any) -> None:
    """Pre-train on a dataset. The same command continues a run that was stopped.

    SIGTERM and SIGUSR1 save a checkpoint and end the run with exit code 75; run the same command to continue.

    Example: fractaltrain pt --shards shards/single --model resnet50
    """
    data = _dataset_config(options)
    published = PT_RECIPES[options["recipe"]]
    _with_overrides(published, nproc, options)  # reports errors in the options before errors in the data
    recipe = _with_overrides(for_dataset(published, _dataset_kind(data)), nproc, options)
    model = ModelConfig(options["model"], _model_arguments(options["model_args"]), options["image_size"])
    out = options["out"] or Path("runs") / f"{data.name}-{model.name}-{recipe.name}"
    _launch(_train, TrainConfig(data, model, recipe, _run_config(out, options)), nproc)


def _train(config: TrainConfig) -> None:
    """Train, in every process."""
    show_logs(config.run.quiet)
    if isinstance(config.data, DatasetConfig):
        from fractaltrain.pretrain import pretrain as run
    else:
        from fractaltrain.finetune import finetune as run
    run(config)


_FT_OPTIONS: _Options = {
    "Data and model": [
        _option("--weights", required=True, metavar="RUN|none|timm",
                help="Folder of a pre-training run; none: train from scratch; timm: timm's published weights."),
        _option("--model", help=f"With --weights none or timm only.  [default: {_DEFAULT_MODEL}]"),
        _MODEL_ARG,
        _option("--freeze", type=click.Choice(get_args(Freeze)), help="Train only the classifier: a linear probe."),
        *_IMAGE_OPTIONS,
        _option("--per-class", type=click.IntRange(1), metavar="N", help="Train on only N images per class."),
        _option("--subset-seed", type=click.IntRange(0), default=0, help="Seed for choosing those images."),
        _option("--image-size", type=click.IntRange(8, 4096), metavar="PX",
                help="Size of the images that the model sees.  [default: the pre-training's; 224 from scratch]"),
    ],
    **_RUN_OPTIONS,
    "Recipe": [
        _option("--recipe", type=click.Choice(sorted(FT_RECIPES)),
                help="Published recipe.  [default: anderson; with --weights none: anderson-scratch]"),
        *_RUN_OPTIONS["Recipe"],
    ],
}  # fmt: skip


@main.command(**_grouped(_FT_OPTIONS))
@quiet_option
def ft(weights: str, model: str | None, nproc: int | None, **options: Any) -> None:
    """Fine-tune a pre-trained model on real images, or train one from scratch to compare with.

    The result is the accuracy on the val split after the last epoch; result.json in the run's folder contains it.

    SIGTERM and SIGUSR1 save a checkpoint and end the run with exit code 75; run the same command to continue.

    Example: fractaltrain ft --weights runs/single-resnet50-anderson --data cifar100
    """
    start: Weights = None if weights == "none" else "timm" if weights == "timm" else Path(weights)
    arguments = _model_arguments(options["model_args"])
    if isinstance(start, Path) and (model is not None or arguments):
        raise UsageError("--model and --model-arg need --weights none or timm; a run has its own model")
    if start is None and options["freeze"] is not None:
        raise UsageError("--freeze needs trained weights, not --weights none")
    published = FT_RECIPES[options["recipe"] or ("anderson" if start else "anderson-scratch")]
    recipe, tars = _with_overrides(published, nproc, options), _tar_options(options)
    find_data(options["data"], tars)
    if isinstance(start, Path):
        load_settings(start)
    data = ImagesConfig(options["data"], options["per_class"], options["subset_seed"], options["data_dir"], tars)
    model_config = ModelConfig(model or _DEFAULT_MODEL, arguments, options["image_size"], start, options["freeze"])
    out = options["out"] or finetuning_folder(data, model_config, recipe.name)
    _launch(_train, TrainConfig(data, model_config, recipe, _run_config(out, options)), nproc)


@main.command("eval", params=_IMAGE_OPTIONS)
@click.option("--weights", required=True, type=PATH, metavar="RUN", help="Folder of a run.")
@click.option("--out", type=PATH, metavar="DIR",
              help="Folder of the report.  [default: eval-DATA in the run's folder]")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), default=256, metavar="B",
              help="Images at a time; affects only memory and speed.")  # fmt: skip
@quiet_option
def evaluate(weights: Path, data: str, data_dir: Path, out: Path | None, batch_size: int, **options: Any) -> None:
    """Evaluate a trained run on a val split: accuracy, overall and by class, and a confusion matrix.

    Multi-label images: mean average precision, F1, and average precision by class.

    Example: fractaltrain eval --weights runs/digits-from-single --data digits
    """
    tars = _tar_options(options)
    load_settings(weights)
    find_data(data, tars)
    _launch(_evaluate, EvalConfig(weights, ImagesConfig(data, None, 0, data_dir, tars), out, batch_size), nproc=1)


def _evaluate(config: EvalConfig) -> None:
    from fractaltrain.evaluate import PICTURE, REPORT, describe_scores, evaluate_run

    with progress("evaluating", "images") as on_progress:
        report = evaluate_run(config, on_progress)
    if report is None:  # this is not rank 0
        return
    click.echo(report.origin)
    _print_classes(report.contents["classes"])
    click.echo(describe_scores(report.contents))
    click.echo(f"{report.folder}: {REPORT}" + (f", {PICTURE}" if "top1" in report.contents else ""))


def _print_classes(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of all classes; if there are many, of the ten worst and the ten best."""
    columns = [column for column in ("class", "name", *_HEADINGS) if column in rows[0]]
    title, leading = "all classes", "top1" if "top1" in columns else "average_precision"
    if len(rows) > _ALL_CLASSES:
        ranked = sorted((row for row in rows if row["samples"]), key=lambda row: float(row[leading]))
        rows, title = [*ranked[:10], *ranked[10:][-10:]], f"the ten worst and the ten best of {len(rows):,} classes"
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(_HEADINGS.get(column, column), justify="left" if column == "name" else "right")
    for row in rows:
        cells = (f"{row[column]:.1%}" if isinstance(row[column], float) else row[column] for column in columns)
        table.add_row(*(Text("-" if cell is None else one_line(str(cell))) for cell in cells))
    click.echo(title)
    Console().print(table)


def _launch(entry: Callable[[_Config], None], config: _Config, nproc: int | None) -> None:
    with needs_extra("train", "training"):
        from fractaltrain.distributed import launch
    launch(entry, config, nproc)


def _with_overrides(recipe: TrainRecipe, nproc: int | None, options: Mapping[str, Any]) -> TrainRecipe:
    """Apply ``--set`` and the options for single fields to a recipe, and check that processes can share its batch."""
    named = {name: options[name] for name in ("epochs", "batch_size", "lr") if options[name] is not None}
    changed = change(recipe, parse_settings(options["changes"]) | named)
    changed = scale_lr(changed, recipe.batch_size) if options["scale_lr"] else changed
    if nproc is not None:
        check_batch(changed, nproc, options["accumulate"])
    return changed


def _tar_options(options: Mapping[str, Any]) -> WebDatasetOptions:
    skip_bad = options.get("on_bad_sample") == "skip"
    return WebDatasetOptions.parse(options["label_key"], options["split"], skip_bad)


def _run_config(out: Path, options: Mapping[str, Any]) -> RunConfig:
    same = {field.name: options[field.name] for field in fields(RunConfig) if field.name not in ("out", "quiet")}
    return RunConfig(out=out, quiet=is_quiet(), **same)


def _model_arguments(texts: Sequence[str]) -> tuple[tuple[str, ModelArgument], ...]:
    """Parse ``--model-arg``: numbers, ``true``, ``false`` and ``none`` become values, anything else is text."""

    def parse(text: str) -> ModelArgument:
        with suppress(msgspec.ValidationError):
            number: bool | float | None = msgspec.convert(
                "null" if text.lower() == "none" else text, bool | int | float | None, strict=False
            )
            return number
        return text

    pairs = parse_settings(texts, "--model-arg")
    return tuple((name, parse(text)) for name, text in pairs.items())


def _dataset_config(options: Mapping[str, Any]) -> DatasetConfig:
    """Return the dataset that the options of ``pt`` describe, after checking that they go together."""
    rendered = options["render"] is not None
    if rendered == (options["shards"] is not None):
        raise UsageError("give the dataset with either --shards or --render")
    location = options["render"] if rendered else options["shards"]
    if not location:
        raise UsageError("--shards or --render is empty; give a path")
    memory_size = parse_bytes(options["memory_size"], "--memory-size")
    data = DatasetConfig(
        location=location,
        rendered=rendered,
        fresh=options["fresh"],
        window=options["window"],
        nodes_split=options["nodes_split"],
        cache_dir=options["cache_dir"],
        cache_size=parse_bytes(options["cache_size"], "--cache-size"),
        memory_size=memory_size if options["memory"] else None,
        tars=_tar_options(options),
    )
    if data.fresh and not rendered:
        raise UsageError("--fresh needs --render: stored images are the same in every epoch")
    if data.fresh and options["memory"]:
        raise UsageError("--fresh and --memory cannot be combined: fresh images are never shown again")
    if rendered or data.is_remote:
        data.tars.check_unused(location)
    return data


def _dataset_kind(data: DatasetConfig) -> str:
    """Return the kind of a dataset, on which some recipes depend; empty for tars of other programs."""
    if data.rendered:
        return str(read_portable(data.path).recipe.get("kind", ""))
    if data.is_remote:
        from fractalshards.remote.cache import open_cache

        manifest = open_cache(data.location, data.cache_dir, data.cache_size, data.window, TRAINING).manifest
    elif find_dataset(data.path, data.tars):
        return ""
    else:
        manifest = load_manifest(data.path)
    return str(manifest.recipe.get("kind", ""))


def _check_data(name: str) -> str:
    if is_data(name):
        return name
    raise click.BadParameter(f"{name!r}{nearest(name, DATA_NAMES)}")


@main.command()
@click.argument("run", type=PATH)
@click.option("--out", required=True, type=PATH, metavar="FOLDER|FILE",
              help="A folder to load or to upload, or a .safetensors file.")  # fmt: skip
def export(run: Path, out: Path) -> None:
    """Write the weights of a run in the form that timm.create_model loads.

    A folder also gets a model card, and can be uploaded to Hugging Face as it is: hf upload NAME FOLDER.

    Example: fractaltrain export runs/single --out single-resnet50
    """
    with needs_extra("train", "export"):
        from fractaltrain.export import export_run
    origin, code = export_run(run, out)
    click.echo(f"{origin}: {out}")
    click.echo(f"import timm; {code}")


@main.command()
@click.argument("file", type=PATH, metavar="STUDY.toml")
@click.option("--out", type=PATH, help="The study's folder.  [default: runs/NAME]")
@click.option("--dry-run", is_flag=True, help="List all runs with their state and command line; start none.")
@click.option("--slice", "slice_", metavar="I/K|auto",
              help="Run only every K-th pre-training and its fine-tunings, for job arrays.")  # fmt: skip
@click.option("--data-dir", type=PATH, default=Path("data"),
              help="Folder of published datasets; missing ones are downloaded.")  # fmt: skip
@click.option("--nproc", type=click.IntRange(1), metavar="N",
              help="Processes of each run.  [default: one per GPU, or 1]")  # fmt: skip
@click.option("--jobs", type=click.IntRange(1), default=1, metavar="N",
              help="Runs at the same time; on CPUs they share the cores.")  # fmt: skip
@quiet_option
def study(
    file: Path, out: Path | None, dry_run: bool, slice_: str | None, data_dir: Path, nproc: int | None, jobs: int
) -> None:
    """Run a grid of pre-training sets, models and fine-tuning sets. Finished runs are skipped, stopped ones continue.

    Example: fractaltrain study studies/demo.toml --dry-run
    """
    part = parse_slice(slice_, os.environ) if slice_ is not None else None
    grid = read_study(file)
    folder = out or Path("runs") / (grid.study.name or file.stem)
    digests, problems = find_datasets(grid)
    plan = plan_study(grid, digests)
    runs = [run for group in (part.of(plan.groups()) if part else plan.groups()) for run in group]
    try:
        check_models(plan, grid.study.image_size)
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from error
    if dry_run:
        for line in describe_study(runs, plan, folder, data_dir):
            click.echo(line)
        for problem in problems:
            note(f"note: {problem}")
        return
    if problems:
        raise FractalError(f"{file}: {'; '.join(problems)}")
    with hold_folder(folder, f"{LOCK}-{part.index}-of-{part.count}" if part else LOCK):
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
    """Compare fine-tuning runs, or folders of them, by mean and spread over seeds: table.csv, table.md, figure.png.

    Example: fractaltrain compare runs/demo --out runs/demo
    """
    comparison = collect_runs(runs)
    if not comparison.runs:
        raise FractalError(f"{human_list([str(run) for run in runs])}: no finished fine-tuning run; check the path")
    _show_comparison(comparison, out)


def _show_comparison(comparison: Comparison, out: Path) -> None:
    click.echo(write_comparison(comparison, out))
    note(f"{out}: {', '.join(FILES)}")
