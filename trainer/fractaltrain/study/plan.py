"""The steps of a study, and how they depend on each other. Pure functions."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fractalshards.errors import UsageError
from fractaltrain.data.finetuning import SHARDS_PREFIX
from fractaltrain.recipes import BY_KIND, FINETUNING, PRETRAINING
from fractaltrain.recipes.recipe import Recipe, change
from fractaltrain.settings import dataset_name
from fractaltrain.study.config import SCRATCH, Figures, Model, Row, Study, Target


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
            **_recipe(run, asked, PRETRAINING, BY_KIND),
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
        settings = {"task": "ft", **known, **_recipe(run, asked, FINETUNING, {}), "data": target.data}
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
    run: str, figures: Figures, recipes: Mapping[str, Recipe], by_kind: Mapping[str, Mapping[str, Mapping[str, Any]]]
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
    following = {figure for own in by_kind.get(name, {}).values() for figure in own}
    return {"recipe": {figure: recipe[figure] for figure in recipe if figure not in following - changes.keys()}}
