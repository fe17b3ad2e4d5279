"""How all pictures look: colours, and the style of a panel. matplotlib is imported when something is drawn."""

from pathlib import Path
from typing import TYPE_CHECKING

from fractalshards.storage import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#66727f", "#e3e8ed"
BLUE, PALE_BLUE, RED, YELLOW, OCHRE = "#2b5c9e", "#9db8d9", "#d1495b", "#edae49", "#b07a1e"
SERIES = (BLUE, RED, YELLOW, "#3a8f7b", PALE_BLUE, "#7b5ea7", "#e59aa4", OCHRE, "#9ccbbd", "#4a5a6a")
"""Colours of things that stand side by side, in this order."""
NEUTRAL = "#b4bdc7"  # of what the others are compared with
_DOTS_PER_INCH = 130


def style(panel: "Axes", title: str, unit: str, weight: str = "normal") -> None:
    """Title and unit of a panel; a faint grid behind everything, and no frame."""
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
        figure.savefig(file, dpi=_DOTS_PER_INCH, format="png")


def plain(text: str) -> str:
    """Text without what matplotlib would take for a formula."""
    return text.replace("$", r"\$")
