"""Figures: ``history.png`` of a run, ``confusion.png`` of an evaluation, and the style of all figures.

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
SERIES = (  # colours of the series in a figure, in this order
    *("#2b5c9e", "#d1495b", "#edae49", "#3a8f7b", "#9db8d9"),
    *("#7b5ea7", "#e59aa4", "#b07a1e", "#9ccbbd", "#4a5a6a"),
)
NEUTRAL = "#b4bdc7"  # colour of the baseline


def style(panel: "Axes", title: str, unit: str, weight: str = "normal") -> None:
    """Set the title of a panel and its unit; draw a faint grid behind it and no frame."""
    panel.set_title(plain(title), loc="left", color=INK, fontsize=11, fontweight=weight)
    panel.set_ylabel(unit, color=MUTED, fontsize=9)
    panel.grid(color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[:].set_visible(False)
    panel.tick_params(colors=MUTED, labelsize=9, length=0)


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG."""
    with atomic_file(path) as file, warnings.catch_warnings(action="ignore"):  # about letters that the font lacks
        figure.savefig(file, dpi=130, format="png")


def plain(text: str) -> str:
    """Return text for matplotlib: on one line, and not read as a formula."""
    return one_line(text).replace("$", r"\$")


_HISTORY = (  # title, unit, and for each curve the split and figure that it shows, and its label
    (
        "Loss", "nats",
        (("train", "loss", "training steps"), ("epoch", "loss", "val"), ("epoch", "train_loss", "training epochs")),
    ),
    (
        "Accuracy on the val split", "%",
        (("epoch", "top1", "top-1"), ("epoch", "top5", "top-5"), ("epoch", "map", "mAP"), ("epoch", "f1", "F1")),
    ),
    ("Learning rate", "", (("train", "lr", ""),)),
    ("Throughput", "images/s", (("train", "images_per_s", ""),)),
    ("Waiting for data", "% of the time", (("train", "waiting", ""),)),
)  # fmt: skip


def draw_history(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw the metrics of a run, given the ``lines`` of its ``metrics.jsonl``."""
    from matplotlib.figure import Figure

    per_epoch = max((line["step"] for line in lines), default=1)
    figure = Figure(figsize=(8, 12), facecolor="white")
    figure.suptitle(plain(path.parent.resolve().name), color=INK, fontsize=13, fontweight="bold")
    panels = figure.subplots(
        len(_HISTORY), sharex=True, gridspec_kw={"top": 0.93, "bottom": 0.05, "right": 0.97, "hspace": 0.35}
    )
    for panel, (title, unit, curves) in zip(panels, _HISTORY, strict=True):
        style(panel, title, unit)
        for (split, name, label), color in zip(curves, SERIES, strict=False):
            shown = [line for line in lines if line["split"] == split and name in line]
            x = [line["epoch"] + line["step"] / per_epoch for line in shown]
            y = [line[name] * (100 if "%" in unit else 1) for line in shown]
            if shown:
                panel.plot(x, y, color=color, marker="o" if split == "epoch" else None, markersize=3, label=label)
        if panel.get_legend_handles_labels()[0]:  # above the panel, where it covers no curve
            panel.legend(
                loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=3, frameon=False, fontsize=9
            )
        if title != "Loss":
            panel.set_ylim(bottom=0)
    panels[-1].set_xlabel("epoch", color=MUTED)
    panels[-1].set_xlim(left=0)
    save(figure, path)


def draw_confusion(path: Path, counts: npt.NDArray[np.int64], classes: int, names: Sequence[str], title: str) -> None:
    """Draw a confusion matrix.

    Args:
        counts: (k, k) images of class i predicted as class j; if k < ``classes``, neighbours share a cell.
        names: class names by index; without any, indices are shown.
    """
    from matplotlib.figure import Figure

    size = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(5 + 0.3 * size, 16)
    figure = Figure(figsize=(side + 0.8, side), facecolor="white")
    figure.set_layout_engine("compressed", w_pad=0.1, h_pad=0.1)  # "constrained" cuts off labels beside square panels
    panel = figure.subplots()
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    style(panel, title, "class")
    panel.grid(visible=False)
    panel.set_xlabel("predicted", color=MUTED)
    ticks = range(0, size, -(-size // 100))
    labels = [names[tick] if size == len(names) else str(tick * classes // size) for tick in ticks]
    labels = [plain(label[:24]) for label in labels]
    panel.set_xticks(ticks, labels, rotation=90)
    panel.set_yticks(ticks, labels)
    figure.colorbar(image, ax=panel, fraction=0.035, label="share of the class").outline.set_visible(False)
    if size <= 25:  # with more classes, numbers would be too small
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.55 else INK
            panel.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=color, fontsize=9)
    save(figure, path)
