"""Figures: ``history.png`` of a run, ``confusion.png`` of an evaluation, and the style that all figures share.

matplotlib is imported when something is drawn.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fractalshards.human import one_line
from fractalshards.storage import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#66727f", "#e3e8ed"
BLUE, PALE_BLUE, RED, YELLOW, OCHRE = "#2b5c9e", "#9db8d9", "#d1495b", "#edae49", "#b07a1e"
SERIES = (BLUE, RED, YELLOW, "#3a8f7b", PALE_BLUE, "#7b5ea7", "#e59aa4", OCHRE, "#9ccbbd", "#4a5a6a")
"""Colours of series in one figure, in this order."""
NEUTRAL = "#b4bdc7"  # colour of the baseline
_DOTS_PER_INCH = 130


def style(panel: "Axes", title: str, unit: str, weight: str = "normal", pad: float = 6) -> None:
    """Set the title, ``pad`` points above a panel, and its unit; draw a faint grid behind it and no frame."""
    panel.set_title(plain(title), loc="left", color=INK, fontsize=11, fontweight=weight, pad=pad)
    panel.set_ylabel(unit, color=MUTED, fontsize=9)
    panel.grid(color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[:].set_visible(False)
    panel.tick_params(colors=MUTED, labelsize=9, length=0)


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG."""
    with atomic_file(path) as file, warnings.catch_warnings(action="ignore"):  # of letters that the font lacks
        figure.savefig(file, dpi=_DOTS_PER_INCH, format="png")


def plain(text: str) -> str:
    """Return text for matplotlib: on one line, and not read as a formula."""
    return one_line(text).replace("$", r"\$")


_TRAIN, _MEAN, _VAL, _SECOND, _SECOND_TEXT = PALE_BLUE, BLUE, RED, YELLOW, OCHRE
_ACCURACIES = ({"top1": "top-1", "top5": "top-5"}, {"map": "mAP", "f1": "F1"})
# Margins of the panels; a layout engine would draw everything twice.
_MARGINS = {"left": 0.075, "right": 0.925, "bottom": 0.085, "top": 0.86, "wspace": 0.22, "hspace": 0.26}
# Between title and panel, where they cover no curve.
_LEGEND: dict[str, Any] = {
    "loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.4, "borderpad": 0, "ncols": 3,
    "columnspacing": 1.2, "handlelength": 1.4, "handletextpad": 0.5, "fontsize": 9, "labelcolor": INK, "frameon": False,
}  # fmt: skip
_LEGEND_PAD = 22


def draw_history(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw the metrics of a run, given the ``lines`` of its ``metrics.jsonl``."""
    from matplotlib.figure import Figure

    epochs = [line for line in lines if line["split"] == "epoch"]
    steps = [line for line in lines if line["split"] == "train"]
    per_epoch = max((line["step"] for line in lines), default=1)
    x = [line["epoch"] + line["step"] / per_epoch for line in steps]
    ends = [line["epoch"] + 1 for line in epochs]
    evaluated = [line for line in epochs if "loss" in line]
    evaluated_at = [line["epoch"] + 1 for line in evaluated]

    figure = Figure(figsize=(10, 6.6), facecolor="white")
    (loss, accuracy), (lr, throughput) = figure.subplots(2, 2, sharex=True, gridspec_kw=_MARGINS)
    figure.suptitle(plain(path.parent.resolve().name), color=INK, fontsize=13, fontweight="bold")

    style(loss, "Loss", "cross-entropy, nats", pad=_LEGEND_PAD)
    loss.plot(x, [line["loss"] for line in steps], color=_TRAIN, linewidth=1, label="training steps")
    _curve(loss, ends, [line["train_loss"] for line in epochs], _MEAN, "training, whole epoch")
    if evaluated:
        _curve(loss, evaluated_at, [line["loss"] for line in evaluated], _VAL, "val")
    loss.legend(**_LEGEND)

    style(accuracy, "Accuracy on the val split", "%", pad=_LEGEND_PAD)
    shown = next((names for names in _ACCURACIES if evaluated and all(name in evaluated[-1] for name in names)), None)
    if shown:
        (first, leading), (second, other) = shown.items()
        leading_curve, other_curve = ([100 * line[name] for line in evaluated] for name in (first, second))
        _curve(accuracy, evaluated_at, other_curve, _SECOND, f"{other}: {other_curve[-1]:.1f} %")
        label = f"{leading}: {leading_curve[-1]:.1f} %, best {max(leading_curve):.1f} %"
        _curve(accuracy, evaluated_at, leading_curve, _VAL, label)
        accuracy.set_ylim(0, 102)
        accuracy.legend(**_LEGEND)

    style(lr, "Learning rate", "")
    lr.plot(x, [line["lr"] for line in steps], color=_MEAN, linewidth=1.6)
    lr.set_ylim(bottom=0)
    lr.set_xlabel("epoch", color=MUTED)

    style(throughput, "Throughput", "images/s")
    throughput.plot(x, [line["images_per_s"] for line in steps], color=_MEAN, linewidth=1.2, label="images/s")
    throughput.set_ylim(bottom=0)
    throughput.set_xlabel("epoch", color=MUTED)
    waiting = throughput.twinx()
    waiting.plot(x, [100 * line["waiting"] for line in steps], color=_SECOND, linewidth=1)
    waiting.set_ylim(0, 100)
    waiting.set_ylabel("waiting for data, % of the time", color=_SECOND_TEXT, fontsize=9)
    waiting.tick_params(colors=_SECOND_TEXT, labelsize=9, length=0)
    waiting.spines[:].set_visible(False)

    for panel in (loss, accuracy, lr, throughput):
        panel.set_xlim(left=0)
        panel.xaxis.get_major_locator().set_params(integer=True)
    save(figure, path)


def _curve(panel: "Axes", x: Sequence[float], y: Sequence[Any], color: str, label: str) -> None:
    panel.plot(x, y, color=color, linewidth=1.8, marker="o", markersize=3, label=label)


_NUMBERED = 25  # with more classes, numbers in cells cannot be read
_MOST_TICKS = 100
_LONGEST_NAME = 24


def draw_confusion(path: Path, counts: npt.NDArray[np.int64], classes: int, names: Sequence[str], title: str) -> None:
    """Draw a confusion matrix.

    Args:
        counts: (k, k) images of class i predicted as class j; with k < ``classes`` neighbours share a cell.
        names: class names by index; empty: indices are shown.
    """
    from matplotlib.figure import Figure

    size = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(5 + 0.3 * size, 16)
    figure = Figure(figsize=(side + 0.8, side), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    panel = figure.subplots()
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    style(panel, title, "class")
    panel.grid(visible=False)
    panel.set_xlabel("predicted", color=MUTED)
    ticks = range(0, size, -(-size // _MOST_TICKS))
    labels = [names[tick] if size == len(names) else str(tick * classes // size) for tick in ticks]
    labels = [plain(label[:_LONGEST_NAME]) for label in labels]
    panel.set_xticks(ticks, labels, rotation=90)
    panel.set_yticks(ticks, labels)
    figure.colorbar(image, ax=panel, fraction=0.035, label="share of the class").outline.set_visible(False)
    if size <= _NUMBERED:
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.55 else INK
            panel.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=color, fontsize=9)
    save(figure, path)
