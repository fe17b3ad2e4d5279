"""What a study file says, as frozen records."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from fractalshards.errors import UsageError
from fractalshards.overrides import nearest, show_value
from fractaltrain.data.finetuning import FOLDER_PREFIX, NAMES, SHARDS_PREFIX, is_data
from fractaltrain.recipes import FINETUNING, PRETRAINING
from fractaltrain.recipes.recipe import Recipe, change
from fractaltrain.study.table import Table

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
        _figures(head.inner("pretraining", _FIGURES), PRETRAINING),
        _figures(head.inner("finetuning", _FIGURES), FINETUNING),
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
        scratch=_figures(top.inner(SCRATCH, _FIGURES), FINETUNING) if SCRATCH in top else None,
        eval_every=head.count("eval_every", 1) or 1,
    )


def _model(models: Table, name: str, shared_pt: Figures, shared_ft: Figures) -> Model:
    table = models.inner(name, ("pretraining", "finetuning", SCRATCH))
    own_pt = _figures(table.inner("pretraining", _FIGURES), PRETRAINING)
    own_ft = _figures(table.inner("finetuning", _FIGURES), FINETUNING)
    own_scratch = _figures(table.inner(SCRATCH, _FIGURES), FINETUNING)
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
        figures=_figures(table, PRETRAINING),
        finetuning=_figures(table.inner("finetuning", _FIGURES), FINETUNING),
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
    return Target(name, data, few or (None,), table.counts("subset_seeds", 0) or (0,), _figures(table, FINETUNING))


def _figures(table: Table, recipes: dict[str, Recipe]) -> Figures:
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
