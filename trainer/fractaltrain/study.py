"""Studies: a grid of pre-training sets, models and fine-tuning sets from one TOML file, as a list of runs.

The folder of a study keeps the plan, from which ``fractaltrain compare`` learns which runs belong to the study.
"""

import codecs
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec

from fractalshards.errors import FractalError, UsageError
from fractalshards.manifest import is_plain
from fractalshards.settings import nearest, show_value
from fractalshards.storage import read_json, remove_leftovers, write_json
from fractaltrain.config import PRECISIONS, Amp, DatasetConfig, ModelArgument
from fractaltrain.data.images import DATA_NAMES, is_data
from fractaltrain.recipes import FT_RECIPES, PT_RECIPES, dataset_fields
from fractaltrain.recipes.recipe import TrainRecipe, change

PLAN = "study.json"
SCRATCH = "scratch"
"""Name of the row of runs that start from random weights."""

_Count = Annotated[int, msgspec.Meta(ge=1)]
_Seeds = Annotated[tuple[Annotated[int, msgspec.Meta(ge=0)], ...], msgspec.Meta(min_length=1)]
_Text = Annotated[str, msgspec.Meta(min_length=1)]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class RecipeChanges(_Table, frozen=True, kw_only=True):
    """A training recipe and changes to its fields; ``set`` takes any field, as ``--set`` does."""

    recipe: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    set: dict[str, Any] = {}

    def texts(self) -> dict[str, str]:
        """Return the changed fields and their values as text."""
        changes = {"epochs": self.epochs, "batch_size": self.batch_size, "lr": self.lr, **self.set}
        return {name: show_value(value) for name, value in changes.items() if value is not None}


class TargetChanges(_Table, frozen=True):
    """``[models.NAME.targets.TARGET]``: changes for one model on one fine-tuning set, which override all others."""

    finetuning: RecipeChanges = RecipeChanges()
    scratch: RecipeChanges = RecipeChanges()


class StudyModel(TargetChanges, frozen=True):
    """``[models.NAME]``: changes for one model; ``scratch`` applies to training from random weights."""

    model: str | None = None  # as --model takes it; None: the name of the table
    args: dict[str, ModelArgument] = {}  # as --model-arg takes them
    pretraining: RecipeChanges = RecipeChanges()
    targets: dict[str, TargetChanges] = {}


class PretrainingSet(RecipeChanges, frozen=True, kw_only=True):
    """``[pretraining.NAME]``: a dataset of shards, and a row of the comparison."""

    shards: _Text  # folder or URL; or a portable recipe, FILE.json, to render
    build: str | None = None  # command that makes the dataset
    models: tuple[str, ...] = ()  # empty: all
    finetuning: RecipeChanges = RecipeChanges()  # for fine-tunings that start from it

    @property
    def dataset(self) -> DatasetConfig:
        """Configuration of the dataset, as for ``pt``."""
        return DatasetConfig(self.shards, rendered=self.shards.endswith(".json"))


class FinetuneSet(RecipeChanges, frozen=True, kw_only=True):
    """``[finetuning.NAME]``: real images; a run for each of ``per_class`` and ``subset_seeds``."""

    data: str | None = None  # a value of --data; None: the name of the table
    per_class: tuple[_Count, ...] = ()  # training images per class; empty: all images
    subset_seeds: _Seeds | None = None  # seeds for choosing these images


class StudyHead(_Table, frozen=True):
    """``[study]``: settings that all runs share."""

    image_size: Annotated[int, msgspec.Meta(ge=8)]
    name: _Text | None = None  # None: the name of the file
    seeds: _Seeds = (0,)
    eval_every: _Count = 1  # epochs
    amp: Amp = "auto"
    pretraining: RecipeChanges = RecipeChanges()
    finetuning: RecipeChanges = RecipeChanges()


class Study(_Table, frozen=True):
    """A study file; without ``scratch``, nothing is trained from random weights."""

    study: StudyHead
    models: Annotated[dict[str, StudyModel], msgspec.Meta(min_length=1)]
    finetuning: Annotated[dict[str, FinetuneSet], msgspec.Meta(min_length=1)]
    pretraining: dict[str, PretrainingSet] = {}
    scratch: RecipeChanges | None = None

    def model_options(self, name: str) -> tuple[str, ...]:
        """Return the options of ``fractaltrain`` that choose a model."""
        model = self.models[name]
        arguments = (("--model-arg", f"{argument}={value}") for argument, value in model.args.items())
        return ("--model", model.model or name, *chain.from_iterable(arguments))

    def shared(self, name: str, seed: int) -> tuple[dict[str, Any], list[str]]:
        """Return what all runs of a model and seed share: settings in their ``run.json``, and options."""
        model, head = self.models[name], self.study
        settings = {"model": model.model or name, "image_size": head.image_size, "seed": seed}
        options = ["--image-size", str(head.image_size), "--seed", str(seed)]
        if model.args:
            settings["model_args"] = model.args
        if head.amp != "auto":
            settings["precision"] = PRECISIONS[head.amp]
            options += ["--amp", head.amp]
        if head.eval_every > 1:
            options += ["--eval-every", str(head.eval_every)]
        return settings, options

    def data(self, target: str) -> str:
        """Return the images of a fine-tuning set, as ``--data`` takes them."""
        return self.finetuning[target].data or target


def read_study(path: Path) -> Study:
    """Read a study file, and check it by planning it once.

    Raises UsageError naming file and field, if a field is unknown, missing or wrong.
    """
    try:
        study = msgspec.toml.decode(path.read_bytes().removeprefix(codecs.BOM_UTF8), type=Study)
        for problem in _problems(study):
            raise UsageError(problem)
        plan_study(study)
    except (msgspec.ValidationError, UsageError) as error:
        raise UsageError(f"{path}: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML ({error})") from error
    return study


def _problems(study: Study) -> Iterator[str]:
    """Yield the errors in a study, except those in types and recipes."""
    for name in (*study.models, *study.pretraining, *study.finetuning):
        if not is_plain(name):
            yield f"{name!r} cannot be part of a file name; use letters, digits, -, _ and ."
    if not study.pretraining and study.scratch is None:
        yield "no table [pretraining.NAME] or [scratch]; add one"
    if SCRATCH in study.pretraining:
        yield f"[pretraining.{SCRATCH}] is not a pre-training; write [{SCRATCH}]"
    for row, dataset in study.pretraining.items():
        for model in set(dataset.models) - set(study.models):
            yield f"[pretraining.{row}] models: {model!r}{nearest(model, study.models)}"
    for name, model_changes in study.models.items():
        for target in set(model_changes.targets) - set(study.finetuning):
            yield f"[models.{name}.targets]: {target!r}{nearest(target, study.finetuning)}"
    for target, images in study.finetuning.items():
        if not is_data(data := study.data(target)):
            yield f"[finetuning.{target}] data: {data!r}{nearest(data, DATA_NAMES)}"
        if images.subset_seeds and not images.per_class:
            yield f"[finetuning.{target}] subset_seeds needs per_class"


@dataclass(frozen=True)
class StudyRun:
    """One run of a study, and its place in the grid."""

    run: str  # name of the run: its folder within that of the study
    settings: dict[str, Any]  # the part of its run.json that the study determines
    row: str  # the pre-training set, or SCRATCH
    model: str
    target: str | None  # the fine-tuning set; None: a pre-training
    per_class: int | None
    seed: int
    subset_seed: int
    start: str | None  # the pre-training that a fine-tuning starts from; None: random weights
    arguments: tuple[str, ...]  # command line of fractaltrain, without paths of the study

    def command(self, folder: Path, data_dir: Path) -> tuple[str, ...]:
        """Return the arguments of ``fractaltrain`` for a study in ``folder``; ``data_dir`` is ``--data-dir``."""
        weights = ("--weights", str(folder / self.start)) if self.start else ()
        images = ("--data-dir", str(data_dir)) if self.target else ()
        return (*self.arguments, *weights, *images, "--out", str(folder / self.run))


@dataclass(frozen=True)
class StudyPlan:
    """All runs of a study; names of rows and models are in the order of the file."""

    rows: tuple[str, ...]
    models: tuple[str, ...]
    pretrainings: tuple[StudyRun, ...]
    finetunings: tuple[StudyRun, ...]

    @cached_property
    def starts(self) -> dict[str, StudyRun]:
        """The pre-trainings by name."""
        return {run.run: run for run in self.pretrainings}

    def groups(self) -> tuple[tuple[StudyRun, ...], ...]:
        """Return independent groups: a pre-training with its fine-tunings, or runs from scratch of a model and seed."""
        groups: dict[tuple[str, str, int], list[StudyRun]] = {}
        for run in sorted((*self.pretrainings, *self.finetunings), key=lambda run: self.rows.index(run.row)):
            groups.setdefault((run.row, run.model, run.seed), []).append(run)
        return tuple(map(tuple, groups.values()))


def plan_study(study: Study, digests: Mapping[str, str] = MappingProxyType({})) -> StudyPlan:
    """List all runs of a study.

    Raises UsageError naming run and field, if a recipe is unknown or a value does not fit it.

    Args:
        digests: known content digests, by location of shards or by ``--data``.
    """
    rows = (*([] if study.scratch is None else [SCRATCH]), *study.pretraining)
    pretrainings, finetunings = [], []
    for row, model, seed in product(rows, study.models, study.study.seeds):
        start = None
        if row != SCRATCH:
            if model not in (study.pretraining[row].models or study.models):
                continue
            pretrainings.append(_plan_pretraining(study, row, model, seed, digests))
            start = pretrainings[-1].run
        for target, images in study.finetuning.items():
            for subset in product(images.per_class or (None,), images.subset_seeds or (0,)):
                finetunings.append(_plan_finetuning(study, row, model, seed, target, *subset, start, digests))
    if len({run.run for run in finetunings}) < len(finetunings):
        raise UsageError("seeds, per_class or subset_seeds: a number occurs twice; remove one")
    return StudyPlan(rows, tuple(study.models), tuple(pretrainings), tuple(finetunings))


def _plan_pretraining(study: Study, row: str, model: str, seed: int, digests: Mapping[str, str]) -> StudyRun:
    name, dataset = f"pt/{row}--{model}--seed{seed}", study.pretraining[row]
    tables = (study.study.pretraining, study.models[model].pretraining, dataset)
    recipe, options = _resolve(name, "anderson", tables, PT_RECIPES)
    follow_dataset = dataset_fields(recipe.name).difference(*(table.texts() for table in tables))
    shared, shared_options = study.shared(model, seed)
    settings = {
        "task": "pt",
        **shared,
        "recipe": {field: value for field, value in asdict(recipe).items() if field not in follow_dataset},
        "dataset": dataset.dataset.name,
        **({"dataset_digest": digests[dataset.shards]} if dataset.shards in digests else {}),
    }
    source = ("--render" if dataset.dataset.rendered else "--shards", dataset.shards)
    arguments = ("pt", *source, *study.model_options(model), *options, *shared_options)
    return StudyRun(name, settings, row, model, None, None, seed, 0, start=None, arguments=arguments)


def _plan_finetuning(
    study: Study, row: str, model: str, seed: int, target: str, per_class: int | None, subset_seed: int,
    start: str | None, digests: Mapping[str, str],
) -> StudyRun:  # fmt: skip
    subset = "" if per_class is None else f"-{per_class}-per-class-{subset_seed}"
    name = f"ft/{target}{subset}--{row}--{model}--seed{seed}"
    changes = study.models[model]
    tables: list[RecipeChanges] = [study.study.finetuning, changes.finetuning, study.finetuning[target]]
    last = changes.targets.get(target, TargetChanges())
    if start is None:
        tables += [study.scratch or RecipeChanges(), changes.scratch, last.scratch]
    else:
        tables += [study.pretraining[row].finetuning, last.finetuning]
    recipe, options = _resolve(name, "anderson" if start else "anderson-scratch", tables, FT_RECIPES)
    data = study.data(target)
    shared, shared_options = study.shared(model, seed)
    settings = {
        "task": "ft",
        **shared,
        "recipe": asdict(recipe),
        "data": data,
        "per_class": per_class,
        "subset_seed": subset_seed,
        **({"data_digest": digests[data]} if data in digests else {}),
    }
    weights = () if start else ("--weights", "none", *study.model_options(model))
    few = ("--per-class", str(per_class), "--subset-seed", str(subset_seed)) if per_class else ()
    arguments = ("ft", *weights, "--data", data, *few, *options, *shared_options)
    return StudyRun(name, settings, row, model, target, per_class, seed, subset_seed, start, arguments)


def _resolve(
    run: str, name: str, tables: Iterable[RecipeChanges], recipes: Mapping[str, TrainRecipe]
) -> tuple[TrainRecipe, list[str]]:
    """Apply the tables to the recipe ``name``, later ones override; return it with the options of the command line."""
    changes: dict[str, str] = {}
    for table in tables:
        name = table.recipe or name
        changes |= table.texts()
    if name not in recipes:
        raise UsageError(f"{run}: recipe {name!r}{nearest(name, recipes)}")
    try:
        recipe = change(recipes[name], changes)
    except UsageError as error:
        raise UsageError(f"{run}, recipe {name}: {error}") from error
    return recipe, ["--recipe", name, *(word for item in changes.items() for word in ("--set", "=".join(item)))]


def write_plan(plan: StudyPlan, folder: Path) -> None:
    """Write the plan of the whole study into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    write_json(folder / PLAN, asdict(plan), indent=1)


def read_plan(folder: Path) -> StudyPlan:
    """Read the plan in a study's folder; raises FractalError if it is damaged or names a run outside the folder."""
    plan = read_json(folder / PLAN, StudyPlan)
    for run in (*plan.pretrainings, *plan.finetunings):
        if not all(map(is_plain, run.run.split("/"))) or run.start not in (None, *plan.starts):
            raise FractalError(f"{folder / PLAN}: {run.run!r} is not a run of this folder; run the study again")
    return plan
