"""The grouped bar chart of a comparison: data and model along x, a bar for every pre-training set."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from fractalshards.atomic import atomic_file
from fractaltrain.comparison.collect import Run, Score

_INK, _MUTED, _GRID = "#1f2933", "#66727f", "#e3e8ed"  # as in history.py
_COLORS = ("#2b5c9e", "#d1495b", "#edae49", "#3a8f7b", "#9db8d9", "#7b5ea7")
_SCRATCH_COLOR = "#b4bdc7"
_WIDTH = 0.9  # of a group


def draw_comparison(runs: Sequence[Run], path: Path) -> None:
    """Draw means as bars and standard deviations as error bars; a cell without runs is hatched."""
    groups = sorted({(run.target, run.model) for run in runs})
    rows = sorted({run.pretraining for run in runs}, key=lambda name: (name == "scratch", name))
    width = _WIDTH / len(rows)
    figure = Figure(figsize=(max(7.0, 0.5 * len(groups) * len(rows)), 4.8), layout="constrained", facecolor="white")
    panel = figure.subplots()
    for place, row in enumerate(rows):
        color = _SCRATCH_COLOR if row == "scratch" else _COLORS[place % len(_COLORS)]
        panel.bar([0], [0], color=color, label=row)
        for group, (target, model) in enumerate(groups):
            x = group + (place - (len(rows) - 1) / 2) * width
            shares = [run.top1 for run in runs if (run.target, run.model, run.pretraining) == (target, model, row)]
            if not shares:
                panel.bar([x], [6], width * 0.92, fill=False, edgecolor=color, hatch="////", linewidth=0.8)
                panel.text(x, 8, "missing", rotation=90, ha="center", va="bottom", color=_MUTED, fontsize=8)
                continue
            score = Score.of(shares)
            panel.bar([x], [score.mean], width * 0.92, color=color)
            if score.std is not None:
                panel.errorbar([x], [score.mean], [score.std], color=_INK, linewidth=1, capsize=3)
            top = score.mean + (score.std or 0) + 1
            panel.text(x, top, f"{score.mean:.1f}\nn={score.n}", ha="center", va="bottom", color=_INK, fontsize=7)
    panel.set_xticks(range(len(groups)), [f"{model}\n{target}" for target, model in groups], color=_INK, fontsize=9)
    panel.set_ylim(0, 112)
    panel.set_yticks(range(0, 101, 20))
    panel.set_ylabel("top-1 after the last epoch, %", color=_MUTED, fontsize=9)
    panel.set_title("mean over runs, ± one standard deviation", loc="left", color=_INK, fontsize=11)
    panel.grid(color=_GRID, linewidth=0.8, axis="y")
    panel.set_axisbelow(True)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    figure.legend(loc="outside lower center", ncols=min(len(rows), 6), frameon=False, fontsize=9, labelcolor=_INK)
    with atomic_file(path) as file:
        figure.savefig(file, dpi=130, format="png")
