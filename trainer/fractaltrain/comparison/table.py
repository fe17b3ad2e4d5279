"""The table of a comparison, as CSV with every figure and as Markdown for people."""

import csv
import io
from collections.abc import Sequence

from fractaltrain.comparison.collect import Run, Score


def to_csv(runs: Sequence[Run]) -> str:
    """A line per cell; a cell without runs has n 0 and no figures. Accuracies in per cent."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("data", "model", "pretraining", "n", "top1", "top1_std", "best_top1", "best_top1_std"))
    for target in _distinct(runs, "target"):
        for model in _distinct(runs, "model"):
            for row in _distinct(runs, "pretraining"):
                cell = _cell(runs, target, model, row)
                writer.writerow((target, model, row, len(cell), *_figures([run.top1 for run in cell]),
                                 *_figures([run.best_top1 for run in cell])))  # fmt: skip
    return text.getvalue()


def to_markdown(runs: Sequence[Run]) -> str:
    """Data and model down, pre-training sets across: mean and standard deviation of top-1 in %, and the number."""
    rows = _distinct(runs, "pretraining")
    lines = ["| data | model | " + " | ".join(rows) + " |", "|---|---|" + "---:|" * len(rows)]
    for target in _distinct(runs, "target"):
        for model in _distinct(runs, "model"):
            cells = [_shown([run.top1 for run in _cell(runs, target, model, row)]) for row in rows]
            lines.append(f"| {target} | {model} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "Top-1 in % after the last epoch: mean ± standard deviation (number of runs).", ""])


def _distinct(runs: Sequence[Run], name: str) -> list[str]:
    return sorted({getattr(run, name) for run in runs})


def _cell(runs: Sequence[Run], target: str, model: str, row: str) -> list[Run]:
    return [run for run in runs if (run.target, run.model, run.pretraining) == (target, model, row)]


def _figures(shares: Sequence[float]) -> tuple[str, str]:
    if not shares:
        return "", ""
    score = Score.of(shares)
    return f"{score.mean:.4f}", "" if score.std is None else f"{score.std:.4f}"


def _shown(shares: Sequence[float]) -> str:
    if not shares:
        return "missing"
    score = Score.of(shares)
    return f"{score.mean:.1f}" + ("" if score.std is None else f" ± {score.std:.1f}") + f" ({score.n})"
