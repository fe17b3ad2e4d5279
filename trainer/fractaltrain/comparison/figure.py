"""The grouped bar chart of a comparison: a panel per data set, a group per model, a bar per pre-training set."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch

from fractaltrain.compare import Cell, Comparison, Score
from fractaltrain.plotting import INK, MUTED, NEUTRAL, SERIES, plain, save, style
from fractaltrain.study import SCRATCH

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR = 0.84  # of the room that a bar has
_GAP = 1.1  # between groups, in bars
_LEAST_GROUP = 3.4  # in bars: below it stands the name of the model
_INCHES_PER_BAR = 0.52
_WIDEST = 17.0  # inches; further panels go below
_PANEL_HEIGHT = 3.9
_LEGEND_INCHES = 1.6  # of an entry
_CAPTION_INCHES = 8.0  # of the longest one
_TOP = 114  # of the axis: 100 %, and the figure above such a bar
_Group = tuple[str, tuple[Cell, ...]]  # a model, and its planned cells


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Draw means as bars, standard deviations as error bars and runs as dots; a cell without runs is hatched.

    Raises:
        OSError: if it cannot be written.
    """
    panels: dict[str, list[_Group]] = {}
    for target, model, cells in comparison.groups():
        planned = tuple(cell for cell in cells if cell in comparison.planned)
        panels.setdefault(target, []).append((model, planned))
    widths = [sum(max(len(cells), _LEAST_GROUP) + _GAP for _, cells in groups) for groups in panels.values()]
    widest = max(widths) * _INCHES_PER_BAR
    columns = max(1, min(len(panels), int(_WIDEST // widest)))
    lines = -(-len(panels) // columns)
    wide = max(columns * widest + 0.9, 6.0)
    figure = Figure(
        figsize=(wide, lines * _PANEL_HEIGHT + 0.9),
        layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1),
        facecolor="white",
    )
    axes = figure.subplots(lines, columns, squeeze=False).flat
    colors = _colors(comparison.rows)
    for panel, (target, groups), width in zip(axes, panels.items(), widths, strict=False):
        _draw_panel(panel, comparison, target, groups, colors)
        spare = (max(widths) - width) / 2  # bars are equally wide in all panels
        panel.set_xlim(-_GAP / 2 - spare, width - _GAP / 2 + spare)
    for panel in list(axes)[len(panels) :]:
        panel.set_visible(False)
    figure.suptitle(_caption(comparison, wide), color=MUTED, fontsize=9, x=0.01, ha="left")
    handles = [Patch(color=color, label=plain(row)) for row, color in colors.items()]
    legend_lines = -(-len(handles) // max(1, int(wide // _LEGEND_INCHES)))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=-(-len(handles) // legend_lines),
        frameon=False, fontsize=9.5, labelcolor=INK, handlelength=1, handleheight=1,
    )  # fmt: skip
    save(figure, path)


def _colors(rows: Sequence[str]) -> dict[str, str]:
    others = [row for row in rows if row != SCRATCH]
    named = {row: SERIES[place % len(SERIES)] for place, row in enumerate(others)}
    return {row: named.get(row, NEUTRAL) for row in rows}


def _caption(comparison: Comparison, width: float) -> str:
    """What is shown, what bars, whiskers and dots are, and the number of runs where it is that of all cells."""
    what = "Top-1 on held-out images after the last epoch."
    numbers = set(comparison.planned.values())
    if numbers == {1}:
        return what
    of = f"{max(numbers)} runs" if len(numbers) == 1 else "all runs"
    end_of_line = "\n" if width < _CAPTION_INCHES else " "
    return f"{what}{end_of_line}Bars: mean of {of}; whiskers: ± one standard deviation; dots: runs."


def _draw_panel(
    panel: "Axes", comparison: Comparison, target: str, groups: Sequence[_Group], colors: dict[str, str]
) -> None:
    style(panel, target, "top-1, %", weight="bold")
    panel.grid(visible=False, axis="x")
    middles, start = [], 0.0
    for _, cells in groups:
        room = max(len(cells), _LEAST_GROUP)
        middles.append(start + room / 2)
        for place, cell in enumerate(cells):
            x = start + (room - len(cells)) / 2 + place + 0.5
            _draw_bar(panel, comparison, cell, x, colors[cell.row])
        start += room + _GAP
    panel.set_xticks(middles, [plain(model) for model, _ in groups], color=INK)
    panel.set_ylim(0, _TOP)
    panel.set_yticks(range(0, 101, 20))


def _draw_bar(panel: "Axes", comparison: Comparison, cell: Cell, x: float, color: str) -> None:
    shares, planned = [run.top1 for run in comparison.of(cell)], comparison.planned[cell]
    if not shares:
        panel.bar([x], [5], _BAR, fill=False, edgecolor=color, hatch="/////", linewidth=0.8)
        panel.text(x, 7, "missing", rotation=90, ha="center", va="bottom", color=MUTED, fontsize=8)
        return
    score = Score.of(shares)
    panel.bar([x], [score.mean], _BAR, color=color)
    top = score.mean
    if score.std is not None:
        panel.errorbar([x], [score.mean], [score.std], color=INK, linewidth=1.1, capsize=3)
        panel.scatter([x] * score.n, [100 * share for share in shares], 9, "white", edgecolors=INK, linewidths=0.6,
                      zorder=3)  # fmt: skip
        top = max(score.mean + score.std, 100 * max(shares))
    number = f"\n{score.n} of {planned}" if score.n < planned else ""
    panel.text(x, top + 2, f"{score.mean:.1f}{number}", ha="center", va="bottom", color=INK, fontsize=8, linespacing=1)
