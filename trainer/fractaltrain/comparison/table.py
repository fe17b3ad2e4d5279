"""The table of a comparison, as CSV with every figure and as Markdown for people."""

import csv
import io
from collections.abc import Sequence

from fractaltrain.comparison.collect import Comparison, Score

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
