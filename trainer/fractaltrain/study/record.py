"""``study.json``: the fine-tunings that a study plans, so that a comparison knows what is missing or left over."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fractalshards.atomic import remove_leftovers, write_json
from fractalshards.errors import FractalError
from fractalshards.fields import Fields
from fractaltrain.run_folder import RUN, difference, flatten, read_settings
from fractaltrain.study.config import SCRATCH, Study
from fractaltrain.study.lineage import outdated
from fractaltrain.study.plan import Group, Step

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
