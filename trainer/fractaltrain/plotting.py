"""Colours and style of all figures. matplotlib is imported by those who draw."""

from pathlib import Path
from typing import TYPE_CHECKING

from fractalshards.storage import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#66727f", "#e3e8ed"
BLUE, PALE_BLUE, RED, YELLOW, OCHRE = "#2b5c9e", "#9db8d9", "#d1495b", "#edae49", "#b07a1e"
NEUTRAL = "#b4bdc7"
"""Colour of the baseline."""
SERIES = (BLUE, RED, YELLOW, "#3a8f7b", PALE_BLUE, "#7b5ea7", "#e59aa4", OCHRE, "#9ccbbd", "#4a5a6a")
"""Colours of categories, in this order."""


def style(panel: "Axes", title: str, unit: str, weight: str = "normal") -> None:
    """Set title and unit of a panel, with a faint grid in the background and no frame."""
    panel.set_title(plain(title), loc="left", color=INK, fontsize=11, fontweight=weight)
    panel.set_ylabel(unit, color=MUTED, fontsize=9)
    panel.grid(color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[:].set_visible(False)
    panel.tick_params(colors=MUTED, labelsize=9, length=0)


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        OSError: if it cannot be written.
    """
    with atomic_file(path) as file:
        figure.savefig(file, dpi=130, format="png")


def plain(text: str) -> str:
    """Escape the characters that matplotlib takes for a formula."""
    return text.replace("$", r"\$")
