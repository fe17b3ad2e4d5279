"""Studies: a grid of pre-training sets, models and fine-tuning sets from one TOML file, as a list of runs.

``read_study`` reads the file, ``plan_study`` lists the runs. The plan is kept in the folder of the study: it tells
``fractaltrain compare`` which runs belong to the study, and which are missing. ``run_study.py`` runs them.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import msgspec

from fractalshards.errors import FractalError, UsageError
from fractalshards.manifest import is_plain
from fractalshards.settings import nearest, show_value
from fractalshards.storage import read_json, remove_leftovers, write_json
from fractaltrain.config import FOLDER_PREFIX, IMAGE_NAMES, SHARDS_PREFIX, ShardsConfig, is_data
from fractaltrain.recipes import FT_RECIPES, PT_RECIPES, dataset_fields
from fractaltrain.recipes.recipe import TrainRecipe, change

SCRATCH = "scratch"
"""Row of the runs that start from random weights."""

_Count = Annotated[int, msgspec.Meta(ge=1)]
_Seed = Annotated[int, msgspec.Meta(ge=0)]
_Text = Annotated[str, msgspec.Meta(min_length=1)]


class RecipeChanges(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A training recipe and changes to its fields; ``set`` takes any field, as ``--set`` does."""

    recipe: str | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    set: dict[str, Any] = {}

    def texts(self) -> dict[str, str]:
        """Return the changed fields and their values as text."""
        named = {"epochs": self.epochs, "batch_size": self.batch_size, "lr": self.lr}
        changes = {name: value for name, value in named.items() if value is not None} | self.set
        return {name: show_value(value) for name, value in changes.items()}


class StudyModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[models.NAME]``: changes for one model; ``scratch`` applies to training from random weights."""

    pretraining: RecipeChanges = RecipeChanges()
    finetuning: RecipeChanges = RecipeChanges()
    scratch: RecipeChanges = RecipeChanges()


class PretrainingSet(RecipeChanges, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[pretraining.NAME]``: a dataset of shards, and a row of the comparison.

    Attributes:
        shards: folder or URL.
        build: command that makes the dataset.
        models: models to train on it; empty: all.
        finetuning: changes for the fine-tunings that start from it.
    """

    shards: _Text
    build: str | None = None
    models: tuple[str, ...] = ()
    finetuning: RecipeChanges = RecipeChanges()


class FinetuneSet(RecipeChanges, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[finetuning.NAME]``: real images.

    Attributes:
        data: as ``--data`` takes it; None: the name of the table.
        per_class: numbers of training images per class, one run for each; empty: one run with all images.
        subset_seeds: seeds of the choice of these images, one run for each.
    """

    data: str | None = None
    per_class: tuple[_Count, ...] = ()
    subset_seeds: Annotated[tuple[_Seed, ...], msgspec.Meta(min_length=1)] | None = None

    def subsets(self) -> Iterator[tuple[int | None, int]]:
        """Yield images per class and subset seed of each run."""
        for per_class in self.per_class or (None,):
            for seed in self.subset_seeds or (0,):
                yield per_class, seed


class StudyHead(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[study]``: what all runs share; ``eval_every`` is in epochs, ``name`` defaults to that of the file."""

    image_size: Annotated[int, msgspec.Meta(ge=8)]
    name: _Text | None = None
    seeds: Annotated[tuple[_Seed, ...], msgspec.Meta(min_length=1)] = (0,)
    eval_every: _Count = 1
    pretraining: RecipeChanges = RecipeChanges()
    finetuning: RecipeChanges = RecipeChanges()


class Study(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A study file; without ``scratch`` nothing is trained from random weights."""

    study: StudyHead
    models: Annotated[dict[str, StudyModel], msgspec.Meta(min_length=1)]
    finetuning: Annotated[dict[str, FinetuneSet], msgspec.Meta(min_length=1)]
    pretraining: dict[str, PretrainingSet] = {}
    scratch: RecipeChanges | None = None

    def data(self, name: str) -> str:
        """Return the images of a fine-tuning set, as ``--data`` takes them."""
        return self.finetuning[name].data or name

    def shards(self) -> set[str]:
        """Return the locations of all datasets of shards."""
        names = [self.data(name) for name in self.finetuning]
        real = [name.removeprefix(SHARDS_PREFIX) for name in names if name.startswith(SHARDS_PREFIX)]
        return {*(dataset.shards for dataset in self.pretraining.values()), *real}


def read_study(path: Path) -> Study:
    """Read a study file, and check it by planning it once.

    Raises:
        UsageError: naming file and field, if a field is unknown, missing or wrong.
        OSError: if it cannot be read.
    """
    try:
        study = msgspec.toml.decode(path.read_bytes(), type=Study)
        for problem in _problems(study):
            raise UsageError(problem)
        plan_study(study)
    except (msgspec.ValidationError, UsageError) as error:
        raise UsageError(f"{path}: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML ({error})") from error
    head = msgspec.structs.replace(study.study, name=study.study.name or path.stem)
    return msgspec.structs.replace(study, study=head)


def _problems(study: Study) -> Iterator[str]:
    """Yield what is wrong with a study, apart from types and recipes."""
    for table, names in (
        ("models", study.models),
        ("pretraining", study.pretraining),
        ("finetuning", study.finetuning),
    ):
        for name in names:
            if not is_plain(name):
                yield f"[{table}] {name!r} cannot be part of a file name; use letters, digits, -, _ and ."
    if not study.pretraining and study.scratch is None:
        yield "no table [pretraining.NAME] or [scratch]; add one"
    if SCRATCH in study.pretraining:
        yield f"[pretraining.{SCRATCH}] is no pre-training; write [{SCRATCH}]"
    for name, dataset in study.pretraining.items():
        for model in dataset.models:
            if model not in study.models:
                yield f"[pretraining.{name}] models: {model!r}{nearest(model, study.models)}"
    for name, images in study.finetuning.items():
        if not is_data(study.data(name)):
            known = (*IMAGE_NAMES, f"{FOLDER_PREFIX}PATH", f"{SHARDS_PREFIX}PATH")
            yield f"[finetuning.{name}] data: {study.data(name)!r}{nearest(study.data(name), known)}"
        if images.subset_seeds and not images.per_class:
            yield f"[finetuning.{name}] subset_seeds needs per_class"


@dataclass(frozen=True)
class StudyRun:
    """One run of a study, and its place in the grid.

    Attributes:
        run: its folder inside the folder of the study.
        settings: what its ``run.json`` must say, as far as the study decides it.
        row: the pre-training set, or ``scratch``.
        target: the fine-tuning set; None: a pre-training.
        start: the pre-training that a fine-tuning starts from, as its ``run``; None: random weights.
        arguments: command line of ``fractaltrain``, without paths of the study; see ``command``.
    """

    run: str
    settings: dict[str, Any]
    row: str = ""
    model: str = ""
    target: str | None = None
    per_class: int | None = None
    seed: int = 0
    subset_seed: int = 0
    start: str | None = None
    arguments: tuple[str, ...] = ()

    def command(self, folder: Path, data_dir: Path) -> tuple[str, ...]:
        """Return the arguments of ``fractaltrain`` for a study in ``folder``, with CIFAR's archives in ``data_dir``."""
        weights = ("--weights", str(folder / self.start)) if self.start else ()
        archives = ("--data-dir", str(data_dir)) if self.target else ()
        return (*self.arguments, *weights, *archives, "--out", str(folder / self.run))


@dataclass(frozen=True)
class StudyPlan:
    """All runs of a study; names of rows, models and targets are in the order of the file."""

    rows: tuple[str, ...]
    models: tuple[str, ...]
    targets: tuple[str, ...]
    pretrainings: tuple[StudyRun, ...]
    finetunings: tuple[StudyRun, ...]

    def groups(self) -> tuple[tuple[StudyRun, ...], ...]:
        """Return each pre-training followed by its fine-tunings; runs from scratch are grouped by model and seed.

        Groups do not depend on each other. Training from scratch comes first: it fails early where images are missing.
        """
        groups: dict[tuple[str, str, int], list[StudyRun]] = {}
        for row in self.rows:
            for run in (*self.pretrainings, *self.finetunings):
                if run.row == row:
                    groups.setdefault((row, run.model, run.seed), []).append(run)
        return tuple(map(tuple, groups.values()))

    @cached_property
    def starts(self) -> dict[str, StudyRun]:
        """Return the pre-trainings by ``run``."""
        return {run.run: run for run in self.pretrainings}


class _Place(NamedTuple):
    """What a pre-training and its fine-tunings, or runs from scratch, have in common."""

    row: str
    model: str
    seed: int

    @property
    def pretraining(self) -> str:
        return f"pt/{self.row}--{self.model}--seed{self.seed}"


def plan_study(study: Study, digests: Mapping[str, str] = MappingProxyType({})) -> StudyPlan:
    """List all runs of a study.

    Args:
        digests: content digests of datasets by location, as far as they are known.

    Raises:
        UsageError: naming run and field, if a recipe is not known or a value does not fit it.
    """
    rows = (*([] if study.scratch is None else [SCRATCH]), *study.pretraining)
    pretrainings, finetunings = [], []
    for place in map(_Place._make, product(rows, study.models, study.study.seeds)):
        if place.row != SCRATCH:
            if place.model not in (study.pretraining[place.row].models or study.models):
                continue
            pretrainings.append(_plan_pretraining(study, place, digests))
        for target, images in study.finetuning.items():
            finetunings += [_plan_finetuning(study, place, target, *subset, digests) for subset in images.subsets()]
    if len({run.run for run in finetunings}) < len(finetunings):
        raise UsageError("seeds, per_class or subset_seeds: a number twice; remove one")
    return StudyPlan(rows, tuple(study.models), tuple(study.finetuning), tuple(pretrainings), tuple(finetunings))


def _plan_pretraining(study: Study, place: _Place, digests: Mapping[str, str]) -> StudyRun:
    dataset = study.pretraining[place.row]
    tables = (study.study.pretraining, study.models[place.model].pretraining, dataset)
    options, recipe = _resolve(place.pretraining, "anderson", tables, PT_RECIPES)
    follow_dataset = dataset_fields(recipe.name) - {field for table in tables for field in table.texts()}
    settings = {
        "task": "pt",
        **_shared_settings(study, place),
        "recipe": {field: value for field, value in asdict(recipe).items() if field not in follow_dataset},
        "dataset": ShardsConfig(dataset.shards).name,
    }
    if dataset.shards in digests:
        settings["dataset_digest"] = digests[dataset.shards]
    arguments = ("pt", "--shards", dataset.shards, "--model", place.model, *options, *_shared_options(study, place))
    return StudyRun(place.pretraining, settings, **place._asdict(), arguments=arguments)


def _plan_finetuning(
    study: Study, place: _Place, target: str, per_class: int | None, subset_seed: int, digests: Mapping[str, str]
) -> StudyRun:
    data, model = study.data(target), study.models[place.model]
    subset = "" if per_class is None else f"-{per_class}-per-class-{subset_seed}"
    run = f"ft/{target}{subset}--{place.row}--{place.model}--seed{place.seed}"
    tables: list[RecipeChanges] = [study.study.finetuning, model.finetuning, study.finetuning[target]]
    if place.row == SCRATCH:
        start, default = None, "anderson-scratch"
        tables += [study.scratch or RecipeChanges(), model.scratch]
    else:
        start, default = place.pretraining, "anderson"
        tables += [study.pretraining[place.row].finetuning]
    options, recipe = _resolve(run, default, tables, FT_RECIPES)
    settings = {
        "task": "ft",
        **_shared_settings(study, place),
        "recipe": asdict(recipe),
        "data": data,
        "per_class": per_class,
        "subset_seed": subset_seed,
    }
    if data.startswith(SHARDS_PREFIX) and (digest := digests.get(data.removeprefix(SHARDS_PREFIX))):
        settings["data_digest"] = digest
    weights = () if start else ("--weights", "none", "--model", place.model)
    few = () if per_class is None else ("--per-class", str(per_class), "--subset-seed", str(subset_seed))
    arguments = ("ft", *weights, "--data", data, *few, *options, *_shared_options(study, place))
    return StudyRun(run, settings, *place[:2], target, per_class, place.seed, subset_seed, start, arguments)


def _shared_settings(study: Study, place: _Place) -> dict[str, Any]:
    return {"model": place.model, "image_size": study.study.image_size, "seed": place.seed}


def _shared_options(study: Study, place: _Place) -> tuple[str, ...]:
    sparse = ("--eval-every", str(study.study.eval_every)) if study.study.eval_every > 1 else ()
    return ("--image-size", str(study.study.image_size), "--seed", str(place.seed), *sparse)


def _resolve(
    run: str, default: str, tables: Iterable[RecipeChanges], recipes: Mapping[str, TrainRecipe]
) -> tuple[list[str], TrainRecipe]:
    """Apply the changes of several tables, later ones last; return options of the command line and the recipe."""
    name = default
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
    return ["--recipe", name, *(word for item in changes.items() for word in ("--set", "=".join(item)))], recipe


PLAN = "study.json"


def write_plan(plan: StudyPlan, folder: Path) -> None:
    """Write the plan of a whole study, not that of a slice, into the study's folder.

    Raises:
        OSError: if it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    write_json(folder / PLAN, asdict(plan), indent=1)


def read_plan(folder: Path) -> StudyPlan:
    """Read the plan in a study's folder.

    Raises:
        FractalError: if it is damaged, or names a run outside of the folder.
        OSError: if it cannot be read.
    """
    path = folder / PLAN
    plan = read_json(path, StudyPlan)
    for run in (*plan.pretrainings, *plan.finetunings):
        parts = PurePosixPath(run.run)
        if parts.is_absolute() or ".." in parts.parts or not parts.parts:
            raise FractalError(f"{path}: run {run.run!r} is outside of the study's folder; do not use this file")
        if run.start is not None and run.start not in plan.starts:
            raise FractalError(f"{path}: start {run.start!r} of {run.run} is not in the plan; run the study again")
    return plan
