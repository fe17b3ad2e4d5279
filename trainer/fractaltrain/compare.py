"""Compare fine-tuning runs: mean and standard deviation over seeds of top-1 after the last epoch."""

import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec

from fractalshards.errors import FractalError, needs_extra
from fractalshards.human import escape_bytes
from fractalshards.storage import read_json, write_bytes
from fractaltrain.plotting import INK, MUTED, NEUTRAL, SERIES, plain, save, style
from fractaltrain.run_folder import RESULT, RUN, RunSettings, load_settings
from fractaltrain.run_study import DONE, find_state
from fractaltrain.study import PLAN, SCRATCH, read_plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILES = ("table.csv", "table.md", "figure.png")
_RUN_NAME = re.compile(r"--(?P<row>.+?)--.+--seed\d+")  # folders of a study's runs


class Cell(NamedTuple):
    """A cell of the table: its runs differ only in seeds; ``row`` is the pre-training set, or ``SCRATCH``."""

    target: str
    model: str
    row: str


class FinishedRun(NamedTuple):
    """A finished fine-tuning, with its accuracy in [0, 1] after the last epoch and in the best evaluated epoch."""

    folder: Path
    cell: Cell
    seeds: tuple[int, int]  # training seed, subset seed
    top1: float
    best_top1: float


def score(shares: Sequence[float]) -> tuple[float, float | None]:
    """Return mean and sample standard deviation (None for a single run) of accuracies in [0, 1], in per cent."""
    values = [100 * share for share in shares]
    return mean(values), stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class Comparison:
    """Finished runs in a grid of targets, models and rows."""

    targets: Sequence[str]
    models: Sequence[str]
    rows: Sequence[str]
    runs: Sequence[FinishedRun]
    planned: Mapping[Cell, int]  # number of runs in each cell of the plan

    def finished(self, cell: Cell) -> list[FinishedRun]:
        """Return the finished runs of a cell."""
        return [run for run in self.runs if run.cell == cell]

    def groups(self) -> Iterator[tuple[str, str, tuple[Cell, ...]]]:
        """Yield each target and model with a planned cell, and its cells, one per row."""
        for target, model in product(self.targets, self.models):
            cells = tuple(Cell(target, model, row) for row in self.rows)
            if any(cell in self.planned for cell in cells):
                yield target, model, cells


def collect_runs(paths: Collection[Path]) -> Comparison:
    """Find all finished fine-tunings below ``paths``; in the folder of a study, only those in its plan.

    Without a study, every cell of the grid counts as planned. Raises FractalError if two runs have the same cell and
    seeds, or a file is damaged.
    """
    studies, folders = (
        sorted({file.parent.resolve() for path in paths for file in path.rglob(name)}) for name in (PLAN, RESULT)
    )
    targets: list[str] = []
    models: list[str] = []
    rows: list[str] = []
    runs: list[FinishedRun] = []
    planned: set[tuple[Cell, tuple[int, int]]] = set()
    for folder in studies:
        plan = read_plan(folder)
        models += plan.models
        rows += plan.rows
        for run in plan.finetunings:
            cell, seeds = Cell(_label(str(run.target), run.per_class), run.model, run.row), (run.seed, run.subset_seed)
            targets.append(cell.target)
            planned.add((cell, seeds))
            if find_state(run, plan, folder) == DONE:
                runs += _read_scores(folder / run.run, cell, seeds)
    others = [*_read_others(folder for folder in folders if not any(map(folder.is_relative_to, studies)))]
    targets += sorted(run.cell.target for run in others)
    models += sorted(run.cell.model for run in others)
    rows += sorted((run.cell.row for run in others), key=lambda row: (row != SCRATCH, row))
    by_place: dict[tuple[Cell, tuple[int, int]], FinishedRun] = {}
    for finished in (*runs, *others):
        if (first := by_place.setdefault((finished.cell, finished.seeds), finished)) is not finished:
            raise FractalError(f"{first.folder} and {finished.folder} have the same cell and seeds; leave one out")
    counts = Counter(cell for cell, _ in planned.union((run.cell, run.seeds) for run in others))
    if not studies:
        counts |= Counter(map(Cell._make, product(set(targets), set(models), set(rows))))
    targets, models, rows = (list(dict.fromkeys(names)) for names in (targets, models, rows))
    return Comparison(targets, models, rows, list(by_place.values()), counts)


def _label(target: str, per_class: int | None) -> str:
    return target if per_class is None else f"{target}, {per_class} per class"


def _read_others(folders: Iterable[Path]) -> Iterator[FinishedRun]:
    """Yield the finished fine-tunings among folders that belong to no study."""
    names: dict[str, str] = {}  # the first name of every dataset by its digest; it may have moved between runs
    for folder in folders:
        settings = load_settings(folder) if (folder / RUN).is_file() else None
        if settings is None or settings.data is None:
            continue
        data = names.setdefault(settings.data_digest or settings.data, settings.data)
        model = " ".join((settings.model, *(f"{name}={value}" for name, value in settings.model_args.items())))
        cell = Cell(_label(data, settings.per_class), model, _name_row(escape_bytes(folder.name), settings))
        yield from _read_scores(folder, cell, (settings.seed, settings.subset_seed or 0))


def _name_row(name: str, settings: RunSettings) -> str:
    """Name what a run started from, by its folder: the end of a default name, or the whole name."""
    if named := _RUN_NAME.search(name):
        return named["row"]
    if settings.weights is None:
        return SCRATCH
    return (name.partition("-from-")[2] or name).replace(f"-{settings.model}-", "-")


_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class _Result(msgspec.Struct):
    top1: _Share | None = None
    best_top1: _Share | None = None


def _read_scores(folder: Path, cell: Cell, seeds: tuple[int, int]) -> list[FinishedRun]:
    """Return the finished run in a folder as a list, which is empty if it has no top-1 (multi-label)."""
    result = read_json(folder / RESULT, _Result)
    if result.top1 is None:
        return []
    best = result.top1 if result.best_top1 is None else result.best_top1
    return [FinishedRun(folder, cell, seeds, result.top1, best)]


def write_comparison(comparison: Comparison, out: Path) -> str:
    """Write the tables and the figure of a comparison with at least one run; return the table as Markdown."""
    table = to_markdown(comparison)
    csv_file, markdown_file, figure = (out / name for name in FILES)
    write_bytes(csv_file, to_csv(comparison).encode())
    write_bytes(markdown_file, table.encode())
    draw_comparison(comparison, figure)
    return table


_COLUMNS = ("data", "model", "pretraining", "planned", "n", "top1", "top1_std", "best_top1", "best_top1_std")


def to_csv(comparison: Comparison) -> str:
    """Format one line per planned cell, in per cent; a cell without finished runs has n = 0 and no values."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for cell in (cell for _, _, cells in comparison.groups() for cell in cells if cell in comparison.planned):
        runs = comparison.finished(cell)
        scores = (*score([run.top1 for run in runs]), *score([run.best_top1 for run in runs])) if runs else [None] * 4
        values = ("" if value is None else f"{value:.4f}" for value in scores)
        writer.writerow((*cell, comparison.planned[cell], len(runs), *values))
    return text.getvalue()


def to_markdown(comparison: Comparison) -> str:
    """Format a table of mean ± standard deviation (runs) of top-1: a line per data and model, a column per row."""
    lines = [("data", "model", *comparison.rows)]
    for target, model, cells in comparison.groups():
        lines.append((target, model, *(_format(comparison, cell) for cell in cells)))
    table = ["| " + " | ".join(name.replace("|", r"\|") for name in line) + " |" for line in lines]
    table.insert(1, "|---|---|" + "---:|" * len(comparison.rows))
    notes = "Top-1 in % after the last epoch: mean ± standard deviation (number of runs)."
    return "\n".join([*table, "", notes, ""])


def _format(comparison: Comparison, cell: Cell) -> str:
    if cell not in comparison.planned:
        return "–"
    if not (runs := comparison.finished(cell)):
        return "missing"
    (average, deviation), planned = score([run.top1 for run in runs]), comparison.planned[cell]
    number = f"{len(runs)}" if len(runs) >= planned else f"{len(runs)} of {planned}"
    return f"{average:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}") + f" ({number})"


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Draw a panel per target, a group of bars per model and a bar per row."""
    with needs_extra("train", "the figure"):
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

    groups: dict[str, dict[str, tuple[Cell, ...]]] = {}
    for target, model, cells in comparison.groups():
        groups.setdefault(target, {})[model] = cells
    bars = max(len(comparison.rows), 3) + 1  # and a gap; fewer would leave no room for the model's name below
    columns = min(len(groups), 3)
    lines = -(-len(groups) // columns)
    size = max(columns * len(comparison.models) * bars / 2, 7), 4 * lines + 1  # inches
    figure = Figure(figsize=size, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    series = cycle(SERIES)
    colors = {row: NEUTRAL if row == SCRATCH else next(series) for row in comparison.rows}
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, (target, models) in zip(panels, groups.items(), strict=False):
        style(panel, target, "top-1, %", weight="bold")
        panel.grid(visible=False, axis="x")
        panel.set_xlim(-1, len(models) * bars - 1)
        panel.set_ylim(0, 114)  # room for the number above a bar of 100 %
        for number, cells in enumerate(models.values()):
            for place, cell in enumerate(cells):
                _draw_bar(panel, comparison, cell, number * bars + place, colors[cell.row])
        ticks = [number * bars + (len(comparison.rows) - 1) / 2 for number in range(len(models))]
        panel.set_xticks(ticks, list(map(plain, models)), color=INK)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    caption = "Top-1 on the val images after the last epoch: mean, standard deviation (whiskers), single runs (dots)."
    figure.suptitle(caption, color=MUTED, fontsize=9, x=0.01, ha="left")
    handles = [Patch(color=color, label=plain(row)) for row, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, labelcolor=INK)
    save(figure, path)


def _draw_bar(panel: "Axes", comparison: Comparison, cell: Cell, x: float, color: str) -> None:
    if cell not in comparison.planned:
        return
    shares, planned = [run.top1 for run in comparison.finished(cell)], comparison.planned[cell]
    if not shares:
        panel.text(x, 2, "missing", rotation=90, ha="center", va="bottom", color=MUTED, fontsize=8)
        return
    average, deviation = score(shares)
    panel.bar(x, average, color=color, yerr=deviation, ecolor=INK, capsize=3)
    panel.scatter([x] * len(shares), [100 * share for share in shares], 9, "white", edgecolors=INK, zorder=3)
    number = f"\n{len(shares)} of {planned}" if len(shares) < planned else ""
    top = max(average + (deviation or 0), 100 * max(shares))
    panel.text(x, top + 2, f"{average:.1f}{number}", ha="center", va="bottom", color=INK, fontsize=8)
