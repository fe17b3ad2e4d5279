"""Finds fine-tuning runs and gathers them into cells: what was fine-tuned on, the model, and what came before."""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from fractalshards.errors import FractalError
from fractalshards.fields import MAX_JSON_BYTES
from fractalshards.storage import read_bounded
from fractaltrain.run_folder import RESULT, RUN, read_settings
from fractaltrain.study import FILE, SCRATCH, PlannedFinetuning, problem_of, read_record

_ENDING = re.compile(r"--(?P<row>.+?)--.+--seed\d+")  # as a study calls its runs


class Cell(NamedTuple):
    """What runs have in common that differ in their seeds only."""

    target: str
    model: str
    row: str


@dataclass(frozen=True)
class Run:
    """A finished fine-tuning; accuracies are shares in [0, 1], ``seeds`` those of training and of the subset."""

    folder: Path
    cell: Cell
    seeds: tuple[int, int]
    top1: float
    best_top1: float


@dataclass(frozen=True)
class Score:
    """Accuracy in per cent over ``n`` runs; ``std`` is that of a sample, None for a single run."""

    n: int
    mean: float
    std: float | None

    @classmethod
    def of(cls, shares: Sequence[float]) -> "Score":
        """The score of shares in [0, 1], one or more."""
        values = [100 * share for share in shares]
        return cls(len(values), mean(values), stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Comparison:
    """Finished runs in a grid; ``rows`` are what came before fine-tuning.

    ``planned`` has the number of runs that a cell shall have, and nothing of a cell that is not planned. Where no study
    said what is planned, every cell shall have the runs that it has, one at least.
    """

    targets: tuple[str, ...]
    models: tuple[str, ...]
    rows: tuple[str, ...]
    runs: tuple[Run, ...]
    planned: Mapping[Cell, int]

    def of(self, cell: Cell) -> tuple[Run, ...]:
        """The finished runs of a cell."""
        return tuple(run for run in self.runs if run.cell == cell)

    def groups(self) -> Iterable[tuple[str, str, tuple[Cell, ...]]]:
        """Every target and model with any planned cell, and all cells of theirs, one per row."""
        for target in self.targets:
            for model in self.models:
                cells = tuple(Cell(target, model, row) for row in self.rows)
                if any(cell in self.planned for cell in cells):
                    yield target, model, cells


def gather(paths: Sequence[Path]) -> Comparison:
    """All finished fine-tunings in folders. In the folder of a study, only those count that it plans.

    Raises:
        FractalError: if two of them have the same cell and seeds, or a file is damaged.
        OSError: if a file cannot be read.
    """
    studies = sorted({file.parent.resolve() for path in paths for file in path.rglob(FILE)})
    folders = sorted({file.parent.resolve() for path in paths for file in path.rglob(RESULT)})
    loose = [
        run
        for folder in folders
        if not any(folder.is_relative_to(study) for study in studies)
        if (run := _read_loose(folder))
    ]
    targets: list[str] = []
    models: list[str] = []
    rows: list[str] = []
    planned: set[tuple[Cell, tuple[int, int]]] = set()
    runs: list[Run] = []
    for folder in studies:
        record = read_record(folder)
        per_class = dict.fromkeys((plan.target, plan.per_class) for plan in record.finetunings)
        targets += [_label(*pair) for name in record.targets for pair in per_class if pair[0] == name]
        models += record.models
        rows += record.rows
        for plan in record.finetunings:
            cell, seeds = Cell(_label(plan.target, plan.per_class), plan.model, plan.row), (plan.seed, plan.subset_seed)
            planned.add((cell, seeds))
            if run := _read_planned(folder, plan, cell, seeds):
                runs.append(run)
    runs += loose
    _check_distinct(runs)
    cells = [run.cell for run in loose]
    comparison = Comparison(
        targets=_distinct(targets, (cell.target for cell in cells)),
        models=_distinct(models, (cell.model for cell in cells)),
        rows=_distinct(rows, (cell.row for cell in cells)),
        runs=tuple(runs),
        planned=_counts({*planned, *((run.cell, run.seeds) for run in loose)}),
    )
    return comparison if studies else _all_planned(comparison)


def _label(target: str, per_class: int | None) -> str:
    return target if per_class is None else f"{target}, {per_class} per class"


def _distinct(ordered: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """Names in the order that a study gives them, then the others: from scratch first, then by name."""
    return tuple(dict.fromkeys([*ordered, *sorted(others, key=lambda name: (name != SCRATCH, name))]))


def _counts(planned: Iterable[tuple[Cell, tuple[int, int]]]) -> dict[Cell, int]:
    counts: dict[Cell, int] = {}
    for cell, _ in planned:
        counts[cell] = counts.get(cell, 0) + 1
    return counts


def _all_planned(comparison: Comparison) -> Comparison:
    """With every cell of the grid planned."""
    grid = product(comparison.targets, comparison.models, comparison.rows)
    return replace(comparison, planned={cell: comparison.planned.get(cell, 1) for cell in map(Cell._make, grid)})


def _check_distinct(runs: Sequence[Run]) -> None:
    seen: dict[tuple[Cell, tuple[int, int]], Run] = {}
    for run in runs:
        other = seen.setdefault((run.cell, run.seeds), run)
        if other is not run:
            raise FractalError(f"{other.folder} and {run.folder} are the same cell with the same seeds; leave one out")


def _read_planned(folder: Path, plan: PlannedFinetuning, cell: Cell, seeds: tuple[int, int]) -> Run | None:
    """The run that a study plans, if it is finished and as planned, and so is what it starts from."""
    run, start = folder / plan.run, plan.start
    if not ((run / RUN).is_file() and (run / RESULT).is_file()):
        return None
    if problem_of(folder, plan.run, plan.settings, start.run if start else None):
        return None
    if start and problem_of(folder, start.run, start.settings, None):
        return None
    scores = _read_scores(run)
    return scores and Run(run, cell, seeds, *scores)


def _read_loose(folder: Path) -> Run | None:
    if not (folder / RUN).is_file():
        return None
    settings = read_settings(folder)
    if settings.get("task") != "ft" or not (scores := _read_scores(folder)):
        return None
    named = _ENDING.search(folder.name)
    fallback = SCRATCH if settings.get("weights") is None else folder.name
    cell = Cell(
        target=_label(str(settings.get("data")), settings.get("per_class")),
        model=str(settings.get("model")),
        row=named["row"] if named else fallback,
    )
    return Run(folder, cell, (int(settings.get("seed", 0)), int(settings.get("subset_seed", 0))), *scores)


def _read_scores(folder: Path) -> tuple[float, float] | None:
    """Top-1 after the last epoch and the best one, as shares; None where the run has no such figure."""
    path = folder / RESULT
    try:
        result = json.loads(read_bounded(path, MAX_JSON_BYTES))
        last = result.get("top1")
        best = result.get("best_top1", last)
    except (ValueError, AttributeError, RecursionError) as error:
        raise FractalError(f"{path}: damaged ({error}); remove it and run the fine-tuning again") from error
    if last is None:
        return None
    for value in (last, best):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise FractalError(f"{path}: top-1 is no share from 0 to 1; remove it and run the fine-tuning again")
    return float(last), float(best)


_COLUMNS = ("data", "model", "pretraining", "planned", "n", "top1", "top1_std", "best_top1", "best_top1_std")


def to_csv(comparison: Comparison) -> str:
    """A line per planned cell; one without runs has n 0 and no figures. Accuracies in per cent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for _, _, cells in comparison.groups():
        for cell in cells:
            if cell in comparison.planned:
                runs = comparison.of(cell)
                figures = (*_figures([run.top1 for run in runs]), *_figures([run.best_top1 for run in runs]))
                writer.writerow((*cell, comparison.planned[cell], len(runs), *figures))
    return text.getvalue()


def to_markdown(comparison: Comparison) -> str:
    """Data and model down, pre-training sets across: mean and standard deviation of top-1 in %, and the number."""
    lines = ["| data | model | " + " | ".join(map(_plain, comparison.rows)) + " |"]
    lines.append("|---|---|" + "---:|" * len(comparison.rows))
    for target, model, cells in comparison.groups():
        shown = [
            _shown([run.top1 for run in comparison.of(cell)], comparison.planned[cell])
            if cell in comparison.planned
            else "–"
            for cell in cells
        ]
        lines.append(f"| {_plain(target)} | {_plain(model)} | " + " | ".join(shown) + " |")
    notes = "Top-1 in % after the last epoch: mean ± standard deviation (number of runs)."
    return "\n".join([*lines, "", notes, ""])


def _figures(shares: Sequence[float]) -> tuple[str, str]:
    if not shares:
        return "", ""
    score = Score.of(shares)
    return f"{score.mean:.4f}", "" if score.std is None else f"{score.std:.4f}"


def _shown(shares: Sequence[float], planned: int) -> str:
    if not shares:
        return "missing"
    score = Score.of(shares)
    number = f"{score.n}" if score.n >= planned else f"{score.n} of {planned}"
    return f"{score.mean:.1f}" + ("" if score.std is None else f" ± {score.std:.1f}") + f" ({number})"


def _plain(name: str) -> str:
    """A name that does not end the cell it stands in; loose runs name paths."""
    return name.replace("|", r"\|")
