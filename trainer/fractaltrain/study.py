"""Reads tables of a TOML file that a person wrote: every error names the file, the table and the key."""

import multiprocessing
import os
import shlex
import signal
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path, PurePosixPath
from statistics import median
from types import FrameType, MappingProxyType
from typing import Any, NamedTuple

import click

from fractalshards.console import is_quiet, note
from fractalshards.digest import sha256_file
from fractalshards.errors import FractalError, UsageError, needs_extra
from fractalshards.fields import Fields
from fractalshards.human import human_count, human_seconds
from fractalshards.manifest import TRAINING, find_manifest, is_plain, load_manifest
from fractalshards.remote.stores import parse_location
from fractalshards.settings import nearest, show_value
from fractalshards.storage import remove_leftovers, write_json
from fractalshards.webdataset import is_foreign, load_foreign
from fractalshards.workers import available_cores, end_with_parent, handling
from fractaltrain.config import dataset_name
from fractaltrain.data.images import FOLDER_PREFIX, NAMES, SHARDS_PREFIX, find_data, is_data
from fractaltrain.preemption import EXIT_STOPPED, SIGNALS, stopped
from fractaltrain.recipes import FT_RECIPES, PT_RECIPES, dataset_fields
from fractaltrain.recipes.recipe import TrainRecipe, change
from fractaltrain.run_folder import RESULT, RUN, difference, flatten, read_metrics, read_settings


class Table:
    """A table of a TOML file, whose keys are all known; any other is an error that suggests the nearest."""

    def __init__(self, data: object, file: Path, name: str, known: tuple[str, ...] | None) -> None:
        """Check the keys. ``known`` None: the keys are names that the user chose, plain as those of files.

        Raises:
            UsageError: if it is no table, or a key is not known.
        """
        self._file, self._name = file, name
        if not isinstance(data, Mapping):
            raise self.error("must be a table")
        self._data = data
        for key in data:
            if known is not None and key not in known:
                raise self.error(f"has no field {key!r}{nearest(key, known)}")
            if known is None and not is_plain(key):
                raise self.error(f"{key!r} cannot be part of a file's name; choose letters, digits, -, _ and .")

    def error(self, text: str) -> UsageError:
        """An error about this table."""
        return UsageError(f"{self._file}: [{self._name}] {text}" if self._name else f"{self._file}: {text}")

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def names(self) -> tuple[str, ...]:
        """The keys, in the order of the file."""
        return tuple(self._data)

    def inner(self, key: str, known: tuple[str, ...] | None) -> "Table":
        """A table inside; an empty one where there is none."""
        return Table(self._data.get(key, {}), self._file, f"{self._name}.{key}" if self._name else key, known)

    def text(self, key: str) -> str | None:
        """A text that is not empty, or None where there is none."""
        value = self._data.get(key)
        if value is not None and not (isinstance(value, str) and value):
            raise self.error(f"{key} is {value!r}, but must be a text")
        return value

    def need(self, key: str) -> str:
        """A text that must be there."""
        value = self.text(key)
        if value is None:
            raise self.error(f"needs {key}")
        return value

    def count(self, key: str, least: int) -> int | None:
        """A whole number, or None where there is none."""
        return None if key not in self._data else self._count(key, self._data[key], least)

    def counts(self, key: str, least: int) -> tuple[int, ...]:
        """A list of different whole numbers, one or more; empty where there is none."""
        if key not in self._data:
            return ()
        values = self._data[key]
        if not isinstance(values, list) or not values or len(set(map(str, values))) != len(values):
            raise self.error(f"{key} is {values!r}, but must be a list of different whole numbers")
        return tuple(self._count(key, value, least) for value in values)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts; empty where there is none."""
        values = self._data.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self.error(f"{key} is {values!r}, but must be a list of texts")
        return tuple(values)

    def plain(self) -> dict[str, Any]:
        """All fields as they are."""
        return dict(self._data)

    def _count(self, key: str, value: object, least: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.error(f"{key} is {value!r}, but must be a whole number of at least {least}")
        return value


_FIGURES = ("recipe", "epochs", "batch_size", "lr", "set")
_SETTABLE = ("epochs", "batch_size", "lr")
SCRATCH = "scratch"


@dataclass(frozen=True)
class Figures:
    """A recipe's name, None where nothing is said, and changes of its figures as text."""

    recipe: str | None = None
    changes: tuple[tuple[str, str], ...] = ()

    def then(self, other: "Figures") -> "Figures":
        """These, with what ``other`` says instead."""
        merged = {**dict(self.changes), **dict(other.changes)}
        return Figures(other.recipe or self.recipe, tuple(merged.items()))


@dataclass(frozen=True)
class Model:
    """A model, and what is different when it is trained; ``scratch``: from random weights."""

    name: str
    pretraining: Figures
    finetuning: Figures
    scratch: Figures


@dataclass(frozen=True)
class Row:
    """A pre-training set: a bar of every group. ``models`` empty: all; ``build``: the command that makes the set."""

    name: str
    shards: str
    build: str | None
    models: tuple[str, ...]
    figures: Figures
    finetuning: Figures


@dataclass(frozen=True)
class Target:
    """A fine-tuning set; ``per_class`` None: all of its images. ``subset_seeds`` choose few-shot images."""

    name: str
    data: str
    per_class: tuple[int | None, ...]
    subset_seeds: tuple[int, ...]
    figures: Figures


@dataclass(frozen=True)
class Study:
    """A grid. ``scratch`` None: no training from random weights to compare with. ``eval_every`` is in epochs."""

    name: str
    image_size: int
    seeds: tuple[int, ...]
    models: tuple[Model, ...]
    rows: tuple[Row, ...]
    targets: tuple[Target, ...]
    scratch: Figures | None
    eval_every: int = 1

    def shards(self) -> dict[str, str]:
        """All datasets of shards, by the name that ``--data`` has for them: their folders and URLs."""
        names = (*(SHARDS_PREFIX + row.shards for row in self.rows), *(target.data for target in self.targets))
        return {name: name.removeprefix(SHARDS_PREFIX) for name in names if name.startswith(SHARDS_PREFIX)}


def read_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        UsageError: naming file, table and key, if a field is unknown, missing or wrong, or a recipe is not known.
        OSError: if it cannot be read.
    """
    try:
        data = tomllib.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path}: not valid TOML ({error})") from error
    top = Table(data, path, "", ("study", "models", "pretraining", "finetuning", "scratch"))
    head = top.inner("study", ("name", "image_size", "seeds", "eval_every", "pretraining", "finetuning"))
    shared_pt, shared_ft = (
        _figures(head.inner("pretraining", _FIGURES), PT_RECIPES),
        _figures(head.inner("finetuning", _FIGURES), FT_RECIPES),
    )
    models, rows, targets = (top.inner(name, None) for name in ("models", "pretraining", "finetuning"))
    if not models.names():
        raise top.error("needs a table [models.NAME]")
    if not targets.names():
        raise top.error("needs a table [finetuning.NAME]")
    if not rows.names() and SCRATCH not in top:
        raise top.error("needs a table [pretraining.NAME], or [scratch]")
    image_size = head.count("image_size", 8)
    if image_size is None:
        raise head.error("needs image_size, the side in pixels of what every model sees")
    return Study(
        name=head.text("name") or path.stem,
        image_size=image_size,
        seeds=head.counts("seeds", 0) or (0,),
        models=tuple(_model(models, name, shared_pt, shared_ft) for name in models.names()),
        rows=tuple(_row(rows, name, models.names()) for name in rows.names()),
        targets=tuple(_target(targets, name) for name in targets.names()),
        scratch=_figures(top.inner(SCRATCH, _FIGURES), FT_RECIPES) if SCRATCH in top else None,
        eval_every=head.count("eval_every", 1) or 1,
    )


def _model(models: Table, name: str, shared_pt: Figures, shared_ft: Figures) -> Model:
    table = models.inner(name, ("pretraining", "finetuning", SCRATCH))
    own_pt = _figures(table.inner("pretraining", _FIGURES), PT_RECIPES)
    own_ft = _figures(table.inner("finetuning", _FIGURES), FT_RECIPES)
    own_scratch = _figures(table.inner(SCRATCH, _FIGURES), FT_RECIPES)
    return Model(name, shared_pt.then(own_pt), shared_ft.then(own_ft), own_scratch)


def _row(rows: Table, name: str, models: tuple[str, ...]) -> Row:
    table = rows.inner(name, ("shards", "build", "models", "finetuning", *_FIGURES))
    if name == SCRATCH:
        raise table.error("is no pre-training; write [scratch]")
    for model in table.texts("models"):
        if model not in models:
            raise table.error(f"names the model {model!r}{nearest(model, models)}")
    return Row(
        name=name,
        shards=table.need("shards"),
        build=table.text("build"),
        models=table.texts("models"),
        figures=_figures(table, PT_RECIPES),
        finetuning=_figures(table.inner("finetuning", _FIGURES), FT_RECIPES),
    )


def _target(targets: Table, name: str) -> Target:
    table = targets.inner(name, ("data", "per_class", "subset_seeds", *_FIGURES))
    data = table.text("data") or name
    if not is_data(data):
        known = (*NAMES, f"{FOLDER_PREFIX}PATH", f"{SHARDS_PREFIX}PATH")
        raise table.error(f"data is {data!r}{nearest(data, known)}")
    few = table.counts("per_class", 1)
    if "subset_seeds" in table and not few:
        raise table.error("subset_seeds goes with per_class only")
    return Target(name, data, few or (None,), table.counts("subset_seeds", 0) or (0,), _figures(table, FT_RECIPES))


def _figures(table: Table, recipes: Mapping[str, TrainRecipe]) -> Figures:
    """What a table says of a recipe; tried on it, so that an error comes now and not when its turn has come."""
    recipe = table.text("recipe")
    if recipe is not None and recipe not in recipes:
        raise table.error(f"recipe is {recipe!r}{nearest(recipe, recipes)}")
    given = table.plain()
    changes = {name: given[name] for name in _SETTABLE if name in given} | table.inner("set", None).plain()
    texts = {name: show_value(value) for name, value in changes.items()}
    try:
        change(recipes[recipe or "anderson"], texts)
    except UsageError as error:
        raise table.error(str(error)) from error
    return Figures(recipe, tuple(texts.items()))


@dataclass(frozen=True)
class Step:
    """One run: ``arguments`` of ``fractaltrain``, and the run's folder inside the study's.

    ``settings`` is what its ``run.json`` must say, JSON-like. ``source`` is what it trains on, as ``--data`` has it.
    ``start`` is the run of the pre-training that it starts from, if any. ``target`` is None for a pre-training.
    """

    run: str
    arguments: tuple[str, ...]
    pretraining: str
    model: str
    seed: int
    settings: dict[str, Any]
    source: str
    start: str | None = None
    target: str | None = None
    per_class: int | None = None
    subset_seed: int = 0


@dataclass(frozen=True)
class Group:
    """A pre-training and all fine-tunings of it, or those from scratch. Groups need nothing of each other."""

    pretraining: Step | None
    finetunings: tuple[Step, ...]

    def steps(self) -> tuple[Step, ...]:
        """All of them, in the order in which they run."""
        return (*((self.pretraining,) if self.pretraining else ()), *self.finetunings)


def plan_study(
    study: Study, out: Path, data_dir: Path, digests: Mapping[str, str] = MappingProxyType({})
) -> tuple[Group, ...]:
    """All groups. Training from scratch comes first: it tells within minutes whether images are missing.

    Args:
        digests: what datasets contain, by ``Step.source``, as far as it is known.
    """
    groups = []
    for row in (*([None] if study.scratch is not None else []), *study.rows):
        for model in study.models:
            if row is None or not row.models or model.name in row.models:
                groups += [_group(study, row, model, seed, out, data_dir, digests) for seed in study.seeds]
    return tuple(groups)


def _group(
    study: Study, row: Row | None, model: Model, seed: int, out: Path, data_dir: Path, digests: Mapping[str, str]
) -> Group:
    sparse = ("--eval-every", str(study.eval_every)) if study.eval_every > 1 else ()
    common = ("--image-size", str(study.image_size), "--seed", str(seed), *sparse)
    known = {"model": model.name, "image_size": study.image_size, "seed": seed}
    name = SCRATCH if row is None else row.name
    ending = f"{name}--{model.name}--seed{seed}"
    pretraining: Step | None = None
    start: tuple[str, ...] = ("--weights", "none", "--model", model.name)
    default, own = "anderson-scratch", (study.scratch or Figures()).then(model.scratch)
    if row is not None:
        run = f"pt/{ending}"
        asked = Figures("anderson").then(model.pretraining).then(row.figures)
        what = ("pt", "--shards", row.shards, "--model", model.name)
        arguments = (*what, *_options(asked), *common, "--out", str(out / run))
        settings = {
            "task": "pt",
            **known,
            **_recipe(run, asked, PT_RECIPES, follows_dataset=True),
            "dataset": dataset_name(row.shards),
        }
        source = SHARDS_PREFIX + row.shards
        settings |= _digest("dataset_digest", source, digests)
        pretraining = Step(run, arguments, name, model.name, seed, settings, source)
        start, default, own = ("--weights", str(out / run)), "anderson", row.finetuning
    steps = []
    for target, per_class, subset_seed in _subsets(study.targets):
        few = () if per_class is None else ("--per-class", str(per_class), "--subset-seed", str(subset_seed))
        label = target.name + ("" if per_class is None else f"-{per_class}-per-class-{subset_seed}")
        run = f"ft/{label}--{ending}"
        asked = Figures(default).then(model.finetuning).then(target.figures).then(own)
        task = ("ft", *start, "--data", target.data, *few, "--data-dir", str(data_dir))
        arguments = (*task, *_options(asked), *common, "--out", str(out / run))
        settings = {"task": "ft", **known, **_recipe(run, asked, FT_RECIPES), "data": target.data}
        settings |= {"per_class": per_class, "subset_seed": subset_seed}
        settings |= _digest("data_digest", target.data, digests)
        first = pretraining.run if pretraining else None
        place = (target.data, first, target.name, per_class, subset_seed)
        steps.append(Step(run, arguments, name, model.name, seed, settings, *place))
    return Group(pretraining, tuple(steps))


def _digest(name: str, source: str, digests: Mapping[str, str]) -> dict[str, str]:
    """What a run says its images are, where that is known."""
    return {name: digests[source]} if source in digests else {}


def _subsets(targets: tuple[Target, ...]) -> Iterator[tuple[Target, int | None, int]]:
    for target in targets:
        for per_class in target.per_class:
            for subset_seed in target.subset_seeds:
                yield target, per_class, subset_seed


def _options(figures: Figures) -> tuple[str, ...]:
    options = ["--recipe", figures.recipe or "anderson"]
    for name, value in figures.changes:
        options += ["--set", f"{name}={value}"]
    return tuple(options)


def _recipe(
    run: str, figures: Figures, recipes: Mapping[str, TrainRecipe], follows_dataset: bool = False
) -> dict[str, Any]:
    """The figures that a run must have; those that follow the kind of its dataset only where the study sets them.

    Raises:
        UsageError: if figures from several tables do not go together.
    """
    name, changes = figures.recipe or "anderson", dict(figures.changes)
    try:
        recipe = asdict(change(recipes[name], changes))
    except UsageError as error:
        raise UsageError(f"{run}, recipe {name}: {error}") from error
    following = dataset_fields(name) if follows_dataset else frozenset()
    return {"recipe": {figure: recipe[figure] for figure in recipe if figure not in following - changes.keys()}}


def find_digests(study: Study) -> dict[str, str]:
    """Content digests of all datasets of ours that lie finished on this machine, by the name that steps use."""
    digests = {}
    for source, place in study.shards().items():
        try:
            location = parse_location(place)
            if location.scheme == "file" and not is_foreign(Path(location.root)):
                digests[source] = load_manifest(Path(location.root)).content_digest()
        except (FractalError, OSError):
            continue  # who needs it says what is wrong
    return digests


def outdated(folder: Path, run: str, start: str | None) -> str | None:
    """What is wrong with a fine-tuning in a study's folder: it began from other weights than the run ``start`` has now.

    None: nothing; or there is no such run, or nothing left to tell by.

    Raises:
        FractalError: if its ``run.json`` is damaged.
    """
    if start is None or not (folder / run / RUN).is_file():
        return None
    from fractaltrain.checkpoint import list_checkpoints

    weights = read_settings(folder / run).get("weights")
    checkpoints = list_checkpoints(folder / start)
    if not checkpoints or any(_sha256(path, path.stat().st_mtime_ns) == weights for path in reversed(checkpoints)):
        return None
    return f"began from other weights than {folder / start} has now, which was trained again; remove it"


@cache
def _sha256(path: Path, mtime_ns: int) -> str:
    """Of a file as it was then: many fine-tunings ask for that of the same one."""
    return sha256_file(path)


@dataclass(frozen=True)
class Size:
    """Of a training set; ``classes`` None: not known without reading all of it."""

    classes: int | None
    samples: int


KNOWN = {"digits": Size(10, 1438), "cifar10": Size(10, 50_000), "cifar100": Size(100, 50_000)}
"""Of the digits, four fifths of every class are for training; see ``data/finetuning.py``."""


@dataclass(frozen=True)
class Cost:
    """Images to be seen, and seconds of training; None: not known."""

    images: int | None
    seconds: float | None


@dataclass(frozen=True)
class Total:
    """Of several costs: the sum of those that are known, and how many are not."""

    steps: int
    images: int
    unknown_images: int
    seconds: float
    unknown_seconds: int

    @classmethod
    def of(cls, costs: Iterable[Cost]) -> "Total":
        """The sum."""
        listed = list(costs)
        images = [cost.images for cost in listed if cost.images is not None]
        seconds = [cost.seconds for cost in listed if cost.seconds is not None]
        return cls(len(listed), sum(images), len(listed) - len(images), sum(seconds), len(listed) - len(seconds))


def step_cost(step: Step, sizes: Mapping[str, Size], speeds: Mapping[str, float]) -> Cost:
    """What a step costs from its start to its end.

    Args:
        sizes: by ``Step.source``, of training sets that are known.
        speeds: images per second, by model.
    """
    size = sizes.get(step.source)
    if size is None or (step.per_class is not None and size.classes is None):
        return Cost(None, None)
    samples = size.samples if step.per_class is None else step.per_class * (size.classes or 0)
    images = samples * int(step.settings["recipe"]["epochs"])
    speed = speeds.get(step.model)
    return Cost(images, images / speed if speed else None)


def find_sizes(study: Study) -> dict[str, Size]:
    """Sizes of all training sets that are known or lie finished on this machine, by the name that steps use."""
    found = {source: _size_of(place) for source, place in study.shards().items()}
    return KNOWN | {source: size for source, size in found.items() if size}


def find_speeds(groups: Sequence[Group], folder: Path, image_size: int) -> dict[str, float]:
    """Images per second by model: the median over all finished runs of a study's folder with images of this size."""
    models = {step.model for group in groups for step in group.steps()}
    found: dict[str, list[float]] = {}
    for result in folder.rglob(RESULT):
        run = result.parent
        try:
            settings = read_settings(run) if (run / RUN).is_file() else {}
            if settings.get("model") in models and settings.get("image_size") == image_size:
                speeds = [line["images_per_s"] for line in read_metrics(run) if line.get("images_per_s")]
                found.setdefault(settings["model"], []).extend(speeds)
        except (FractalError, OSError, ValueError, AttributeError):
            continue  # a damaged run tells no speed; who uses it says what is wrong
    return {model: median(speeds) for model, speeds in found.items() if speeds}


def _size_of(place: str) -> Size | None:
    """Of a dataset of shards on this machine."""
    try:
        location = parse_location(place)
        if location.scheme != "file":
            return None
        folder = Path(location.root)
        if is_foreign(folder):
            info = load_foreign(folder)
            samples = sum(count for _, count in info.splits.get(TRAINING, ()))
            return Size(info.classes, samples) if samples else None
        manifest = load_manifest(folder)
        return Size(manifest.classes, manifest.samples(TRAINING)) if TRAINING in manifest.splits else None
    except (FractalError, OSError):
        return None  # not made yet, or of no use: what runs says so


FILE = "study.json"
_DIGESTS = ("dataset_digest", "data_digest")


@dataclass(frozen=True)
class PlannedRun:
    """A run that a study plans. ``settings`` is what its ``run.json`` must say, JSON-like."""

    run: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class PlannedFinetuning(PlannedRun):
    """A fine-tuning, and where it stands in the grid; ``start`` is the run it starts from, None from scratch."""

    row: str
    model: str
    target: str
    per_class: int | None
    seed: int
    subset_seed: int
    start: PlannedRun | None


@dataclass(frozen=True)
class Record:
    """The plan of a study; names of rows, models and targets are in the order of the file."""

    rows: tuple[str, ...]
    models: tuple[str, ...]
    targets: tuple[str, ...]
    finetunings: tuple[PlannedFinetuning, ...]


def write_record(study: Study, groups: Sequence[Group], folder: Path) -> None:
    """Write the plan into the study's folder.

    Args:
        groups: all of the study, not those of a slice.

    Raises:
        OSError: if it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    starts = [group.pretraining for group in groups if group.pretraining]
    content = {
        "name": study.name,
        "rows": [*([SCRATCH] if study.scratch is not None else []), *(row.name for row in study.rows)],
        "models": [model.name for model in study.models],
        "targets": [target.name for target in study.targets],
        "pretrainings": [{"run": step.run, "settings": step.settings} for step in starts],
        "finetunings": [_to_json(step) for group in groups for step in group.finetunings],
    }
    write_json(folder / FILE, content, indent=1)


def read_record(folder: Path) -> Record:
    """Read the plan in a study's folder.

    Raises:
        FractalError: if it is damaged, or names a run outside of the folder.
        OSError: if it cannot be read.
    """
    path = folder / FILE
    fields = Fields.read(path)
    starts = {}
    for entry in fields.inners("pretrainings"):
        start = PlannedRun(_inside(entry.text("run"), path), entry.mapping("settings"))
        starts[start.run] = start
    rows, models, targets = (fields.texts(name) for name in ("rows", "models", "targets"))
    finetunings = tuple(_from_json(entry, starts, path) for entry in fields.inners("finetunings"))
    for run in finetunings:
        for value, known in ((run.row, rows), (run.model, models), (run.target, targets)):
            if value not in known:
                raise FractalError(f"{path}: {run.run} is of {value!r}, which is not listed; run the study again")
    return Record(rows, models, targets, finetunings)


def disagreement(run: Path, wanted: Mapping[str, Any]) -> str | None:
    """What the run in a folder was made with that is not ``wanted``; None: nothing, or there is no run yet."""
    if not (run / RUN).exists():
        return None
    found, flat = read_settings(run), flatten(wanted)
    name = next((name for name in flat if found.get(name) != flat[name]), None)
    if name in _DIGESTS:
        return (
            "the dataset that it was trained on was built again, with other content; remove it and what was fine-tuned "
            "from it, or choose another --out"
        )
    return name and f"holds a run {difference(name, found, flat)}; remove it, or choose another --out"


def problem_of(folder: Path, run: str, wanted: Mapping[str, Any], start: str | None) -> str | None:
    """Why a run in a study's folder is not to be used; None: it is, or there is none yet.

    Args:
        wanted: settings that it must have.
        start: the run that it starts from.
    """
    return disagreement(folder / run, wanted) or outdated(folder, run, start)


def _to_json(step: Step) -> dict[str, Any]:
    return {
        "run": step.run,
        "row": step.pretraining,
        "model": step.model,
        "target": step.target,
        "per_class": step.per_class,
        "seed": step.seed,
        "subset_seed": step.subset_seed,
        "start": step.start,
        "settings": step.settings,
    }


def _from_json(entry: Fields, starts: Mapping[str, PlannedRun], path: Path) -> PlannedFinetuning:
    start = None if entry.is_null("start") else entry.text("start")
    if start is not None and start not in starts:
        raise FractalError(f"{path}: starts from {start!r}, which it does not plan; run the study again")
    return PlannedFinetuning(
        run=_inside(entry.text("run"), path),
        settings=entry.mapping("settings"),
        row=entry.text("row"),
        model=entry.text("model"),
        target=entry.text("target"),
        per_class=None if entry.is_null("per_class") else entry.count("per_class"),
        seed=entry.count("seed"),
        subset_seed=entry.count("subset_seed"),
        start=None if start is None else starts[start],
    )


def _inside(run: str, path: Path) -> str:
    """A run's folder, which lies in the study's."""
    parts = PurePosixPath(run)
    if parts.is_absolute() or ".." in parts.parts or not parts.parts:
        raise FractalError(f"{path}: the run {run!r} is not inside the study's folder; do not use this file")
    return run


_CLASSES = 2  # any number: only the classifier depends on it


def check_datasets(study: Study, file: Path) -> None:
    """Look for all that shall lie on this machine.

    Raises:
        FractalError: naming all that is missing, and the commands that make it.
    """
    if problems := list(missing_datasets(study)):
        raise FractalError(f"{file}: {'; '.join(problems)}")


def missing_datasets(study: Study) -> Iterator[str]:
    """Of shards and image folders that are not on this machine, though they should be: the table, and what to do."""
    for row in study.rows:
        location = parse_location(row.shards)
        if location.scheme == "file":
            try:
                find_manifest(Path(location.root))
            except FractalError as error:
                advice = f"{row.shards}: no finished dataset; run {row.build}" if row.build else str(error)
                yield f"[pretraining.{row.name}] {advice}"
    for target in study.targets:
        try:
            find_data(target.data)
        except FractalError as error:
            yield f"[finetuning.{target.name}] {error}"


def check_models(groups: Sequence[Group], image_size: int, file: Path) -> None:
    """Build every model once as each of its steps does, without memory for its weights.

    Raises:
        UsageError: naming the first that there is not, or that a recipe or the size of images does not fit.
    """
    with needs_extra("train", "a study"):
        import torch

        from fractaltrain.models import create_model
    steps = (step for group in groups for step in group.steps())
    for model, drop_path in dict.fromkeys((step.model, step.settings["recipe"]["drop_path"]) for step in steps):
        try:
            with torch.device("meta"):
                create_model(model, _CLASSES, image_size, drop_path)
        except FractalError as error:
            raise UsageError(f"{file}: [models.{model}] {error}") from error


_HEAD = ("pre-training", "model", "seed", "to do", "images", "training")
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class _Priced:
    step: Step
    done: bool
    problem: str | None
    cost: Cost


def describe(
    groups: Sequence[Group], folder: Path, sizes: Mapping[str, Size], speeds: Mapping[str, float]
) -> Iterator[str]:
    """A table of the groups and its total, both of what is to do; then every step with its command line.

    Args:
        sizes: as ``find_sizes`` gives them.
        speeds: as ``find_speeds`` gives them.
    """
    priced = [
        [_Priced(*standing, step_cost(standing.step, sizes, speeds)) for standing in standings(group, folder)]
        for group in groups
    ]
    rows = [_HEAD]
    for steps in priced:
        first, left = steps[0].step, _to_do(steps)
        number = f"{len(left)} of {len(steps)}"
        rows.append((first.pretraining, first.model, str(first.seed), number, *_shown(step.cost for step in left)))
    yield from _aligned(rows)
    everything = [step for steps in priced for step in steps]
    left = _to_do(everything)
    yield ""
    yield _total_line(len(left), len(everything), Total.of(step.cost for step in left))
    yield ""
    for step in everything:
        images, seconds = _shown([step.cost])
        state = f"not usable: {step.problem}" if step.problem else "done" if step.done else "to do"
        yield f"# {step.step.run}: {state}; images: {images}, training: {seconds}"
        yield f"fractaltrain {shlex.join(step.step.arguments)}"


def _to_do(steps: Iterable[_Priced]) -> list[_Priced]:
    return [step for step in steps if not step.done]


def _shown(costs: Iterable[Cost]) -> tuple[str, str]:
    """Images and time."""
    total = Total.of(costs)
    return (
        _partly(f"{total.images:,}", total.unknown_images, total.steps),
        _partly(human_seconds(total.seconds), total.unknown_seconds, total.steps),
    )


def _partly(known: str, unknown: int, steps: int) -> str:
    """A sum over steps, of which some or all may be unknown."""
    if unknown and unknown == steps:
        return _UNKNOWN
    return f"{known} + ?" if unknown else known


def _total_line(left: int, steps: int, total: Total) -> str:
    if not left:
        return f"all {human_count(steps, 'step')} done"
    images = "unknown" if total.unknown_images == left else f"{total.images:,}"
    seconds = (
        "unknown" if total.unknown_seconds == left else f"{human_seconds(total.seconds)} at the speed of runs here"
    )
    return (
        f"{left:,} of {human_count(steps, 'step')} to do; images: {images}{_besides(total.unknown_images, left)}; "
        f"training: {seconds}{_besides(total.unknown_seconds, left)}"
    )


def _besides(unknown: int, of: int) -> str:
    return f" and {human_count(unknown, 'unknown step')}" if 0 < unknown < of else ""


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns of equal width; all but the first two are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (text.ljust(width) if place < 2 else text.rjust(width)
                 for place, (text, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        yield "  ".join(cells).rstrip()


_IMPORTED = (
    *("fractaltrain.distributed", "fractaltrain.pretrain", "fractaltrain.finetune", "fractaltrain.log"),
    *("torch.utils.tensorboard", "matplotlib.figure", "sklearn.datasets"),
)
_HELD = (*SIGNALS, signal.SIGINT)
_THREADS = "OMP_NUM_THREADS"
_INTERRUPT_SECONDS = 5.0


class Processes:
    """Commands of ``fractaltrain`` that run beside each other, by name."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._processes: dict[str, ForkServerProcess] = {}
        self._asked = 0

    @property
    def running(self) -> int:
        """How many there are."""
        return len(self._processes)

    def start(self, name: str, arguments: Sequence[str], log: Path | None = None) -> None:
        """Start one; what it prints goes into ``log``, if that is given.

        Raises:
            StoppedError: instead, if a signal came, when all others have ended.
            OSError: if the log cannot be written.
        """
        if self._asked:
            self.wait()
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
        process = self._context.Process(target=_run, args=(tuple(arguments), log), name=name)
        process.start()
        self._processes[name] = process
        if self._asked:  # while it was started
            self.pass_on(self._asked)

    def wait(self) -> tuple[str, int]:
        """Name and exit code of one that has ended, when the first does.

        Raises:
            StoppedError: instead, if a signal came, when all have ended.
            KeyboardInterrupt: if one was interrupted.
        """
        while self._processes:
            connection.wait([process.sentinel for process in self._processes.values()])
            name = next(name for name, process in self._processes.items() if not process.is_alive())
            code = self._processes.pop(name).exitcode or 0
            if code == EXIT_STOPPED or -code in SIGNALS:
                self.pass_on(self._asked or signal.SIGTERM)
            if code in (-signal.SIGINT, 128 + signal.SIGINT):
                raise KeyboardInterrupt
            if not self._asked:
                return name, code
        raise stopped(self._asked)

    def pass_on(self, number: int, frame: FrameType | None = None) -> None:
        """Give a signal to all of them, those that are being started too; none starts after it."""
        self._asked = number
        for process in list(self._processes.values()):
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def end(self) -> None:
        """End what still runs, after an error: Ctrl-C at a terminal comes to all, so they have some time for it."""
        for process in self._processes.values():
            process.join(_INTERRUPT_SECONDS)
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGINT)
            process.join()


@contextmanager
def step_processes(threads: int | None = None) -> Iterator[Processes]:
    """Inside the block, SIGTERM and SIGUSR1 go to the processes, and no more are started.

    Args:
        threads: that each computes with, unless OMP_NUM_THREADS says so; None: as it chooses.

    Raises:
        StoppedError: if Ctrl-C ends the block, or one of the processes.
    """
    processes = Processes()
    _start_server(threads)
    with handling(processes.pass_on, *SIGNALS):
        try:
            yield processes
        except KeyboardInterrupt as error:
            raise stopped(signal.SIGINT) from error
        finally:
            processes.end()


def _start_server(threads: int | None) -> None:
    """Start what forks the processes. Signals that come to all processes of a job must not end it: it holds them."""
    multiprocessing.set_forkserver_preload(list(_IMPORTED))
    resource_tracker.ensure_running()  # else the server would start it, which unblocks the signals
    chosen = threads is not None and _THREADS not in os.environ
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        if chosen:
            os.environ[_THREADS] = str(threads)
        forkserver.ensure_running()
    finally:
        if chosen:
            del os.environ[_THREADS]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run(arguments: tuple[str, ...], log: Path | None) -> None:
    """What each of the processes runs: the command line, as its own process would, but Ctrl-C ends it silently."""
    from fractaltrain.cli import main

    end_with_parent()
    if log:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, sys.__stdout__.fileno() if sys.__stdout__ else 1)
        os.close(file)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the study says it, once for all
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
    main(list(arguments), prog_name="fractaltrain")


_LOGS = "log"


class Standing(NamedTuple):
    """A step, whether it is done, and why what is in its folder cannot be used; None: it can be."""

    step: Step
    done: bool
    problem: str | None


def is_done(step: Step, folder: Path) -> bool:
    """Whether a step came to its end."""
    return (folder / step.run / RESULT).exists()


def standings(group: Group, folder: Path) -> list[Standing]:
    """How far the steps of a group are; none can be used that starts from what cannot be."""
    found: dict[str, Standing] = {}
    for step in group.steps():
        problem = problem_of(folder, step.run, step.settings, step.start)
        if step.start and found[step.start].problem and (folder / step.run).exists():
            problem = f"starts from {step.start}, which is not usable; remove it, too"
        found[step.run] = Standing(step, is_done(step, folder) and not problem, problem)
    return list(found.values())


def run_groups(groups: Sequence[Group], folder: Path, nproc: int | None, jobs: int = 1) -> list[str]:
    """Run all that is not done; return the runs that are missing in the end. A failure stops only what needs it.

    Args:
        nproc: processes of each step; None: as many as there are GPUs.
        jobs: steps that run at once. If several, what they say is written into the study's folder.

    Raises:
        StoppedError: if a signal asked for it, after the steps under way have saved.
    """
    waiting = [step for group in groups for step in group.steps()]
    found = [standing for group in groups for standing in standings(group, folder)]
    refused = {standing.step.run: standing.problem for standing in found if standing.problem}
    for run, problem in refused.items():
        click.echo(f"{folder / run}: {problem}", err=True)
    if ready := sum(standing.done for standing in found):
        note(f"{folder}: done already: {ready:,} of {human_count(len(waiting), 'step')}")
    if jobs > 1:
        note(f"{folder / _LOGS}: what the steps say")
    done: dict[str, bool] = {}  # whether a step that has been tried came to its end
    threads = max(available_cores() // (jobs * (nproc or 1)), 1) if jobs > 1 else None
    with step_processes(threads) as processes:
        while waiting or processes.running:
            step = _startable(waiting, done) if processes.running < jobs else None
            if step:
                waiting.remove(step)
                settled = False if step.run in refused else _settled(step, folder, done)
                if settled is None:
                    _start(step, folder, nproc, processes, logged=jobs > 1)
                else:
                    done[step.run] = settled
            else:
                run, code = processes.wait()
                done[run] = code == 0
                _tell_end(folder, run, code, logged=jobs > 1)
    return [step.run for group in groups for step in group.steps() if not done[step.run]]


def _startable(waiting: Sequence[Step], done: Mapping[str, bool]) -> Step | None:
    """The first step that starts from nothing, or from what has been tried."""
    return next((step for step in waiting if step.start is None or step.start in done), None)


def _settled(step: Step, folder: Path, done: Mapping[str, bool]) -> bool | None:
    """Whether a step is done, or never will be; None: it is to be run."""
    if step.start and not done[step.start]:
        return False
    if problem := problem_of(folder, step.run, step.settings, step.start):  # what it starts from may be new
        click.echo(f"{folder / step.run}: {problem}", err=True)
        return False
    return True if is_done(step, folder) else None


def _start(step: Step, folder: Path, nproc: int | None, processes: Processes, logged: bool) -> None:
    arguments = step.arguments + (() if nproc is None else ("--nproc", str(nproc)))
    if is_quiet():
        arguments += ("--quiet",)
    else:
        click.echo(f"{'' if logged else chr(10)}$ fractaltrain {shlex.join(arguments)}")
    processes.start(step.run, arguments, _log(folder, step.run) if logged else None)


def _tell_end(folder: Path, run: str, code: int, logged: bool) -> None:
    if code:
        click.echo(f"{folder / run}: failed with exit code {code}; going on with what does not need it", err=True)
    elif logged and not is_quiet():
        click.echo(f"{folder / run}: done")


def _log(folder: Path, run: str) -> Path:
    return folder / _LOGS / f"{run}.txt"
