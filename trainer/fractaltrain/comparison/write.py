"""Writes a comparison: ``table.csv``, ``table.md`` and ``figure.png``."""

from pathlib import Path

from fractalshards.errors import needs_extra
from fractalshards.storage import write_bytes
from fractaltrain.compare import Comparison, to_csv, to_markdown

FILES = ("table.csv", "table.md", "figure.png")


def write_comparison(comparison: Comparison, out: Path) -> str:
    """Write a comparison of at least one run; return the table as Markdown.

    Raises:
        OSError: if it cannot be written.
    """
    with needs_extra("train", "the figure"):
        from fractaltrain.comparison.figure import draw_comparison
    table = to_markdown(comparison)
    csv_file, markdown_file, picture = (out / name for name in FILES)
    write_bytes(csv_file, to_csv(comparison).encode())
    write_bytes(markdown_file, table.encode())
    draw_comparison(comparison, picture)
    return table
