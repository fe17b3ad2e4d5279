"""``confusion.png``: which class was taken for which, as shares of the images of each class."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fractalshards.human import one_line
from fractaltrain.data.source import Indices
from fractaltrain.plotting import INK, MUTED, plain, save

FILE = "confusion.png"
_NUMBERED = 25  # with more classes, numbers in cells cannot be read
_NAMED = 120  # with more classes, axes have every so-manieth index
_LONGEST_NAME = 24


def draw_confusion(path: Path, counts: Indices, classes: int, names: Sequence[str], title: str) -> None:
    """Draw a confusion matrix.

    Args:
        counts: (k, k), images of class i that were taken for class j; with k < ``classes`` a cell is of several.
        names: by class index; indices are shown where there are none.

    Raises:
        OSError: if it cannot be written.
    """
    from matplotlib.figure import Figure  # it takes a second, which only the main process needs
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    size = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(3.2 + 0.55 * size if size <= _NUMBERED else 6 + 0.1 * size, 5, 16))
    figure = Figure(figsize=(side + 0.8, side), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1), facecolor="white")
    panel = figure.subplots()
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    panel.set_title(plain(one_line(title)), loc="left", color=INK, fontsize=12, fontweight="bold")
    panel.set_ylabel("class", color=MUTED)
    panel.set_xlabel("taken for", color=MUTED)
    panel.spines[:].set_visible(False)
    panel.tick_params(colors=INK, length=0, labelsize=9 if size <= _NUMBERED else 6.5)
    ticks, labels = _ticks(size, classes, names)
    upright = size <= _NUMBERED and all(len(label) <= 3 for label in labels)
    panel.set_xticks(ticks, labels, rotation=0 if upright else 90)
    panel.set_yticks(ticks, labels)
    bar = figure.colorbar(image, ax=panel, fraction=0.035, format=lambda share, _: f"{100 * share:.0f} %")
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelsize=9, length=0)
    if size <= _NUMBERED:
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.55 else INK
            panel.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=color, fontsize=9)
    save(figure, path)


def _ticks(size: int, classes: int, names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Where labels stand along an axis, and what they say."""
    if size <= _NAMED:
        return list(range(size)), [_short(names[index]) if names else str(index) for index in range(size)]
    ticks = list(range(0, size, max(size // 20, 1)))
    return ticks, [f"{tick * classes // size:,}" for tick in ticks]


def _short(name: str) -> str:
    shown = one_line(name)
    return plain(shown if len(shown) <= _LONGEST_NAME else f"{shown[: _LONGEST_NAME - 1]}…")
