"""Writes a comparison: ``table.csv``, ``table.md`` and ``figure.png``."""

from collections.abc import Sequence
from pathlib import Path

from fractalshards.atomic import atomic_file
from fractalshards.errors import FractalError
from fractalshards.extras import needs_extra
from fractaltrain.comparison.collect import gather
from fractaltrain.comparison.table import to_csv, to_markdown


def write_comparison(paths: Sequence[Path], out: Path) -> str:
    """Compare all finished fine-tunings in ``paths``; return the table as Markdown.

    Raises:
        FractalError: if there is none, and as ``gather`` does.
        OSError: if it cannot be written.
    """
    comparison = gather(paths)
    if not comparison.runs:
        raise FractalError(f"{', '.join(map(str, paths))}: no finished fine-tuning run; check the path")
    with needs_extra("train", "the figure"):
        from fractaltrain.comparison.figure import draw_comparison
    out.mkdir(parents=True, exist_ok=True)
    table = to_markdown(comparison)
    for name, text in (("table.csv", to_csv(comparison)), ("table.md", table)):
        with atomic_file(out / name) as file:
            file.write(text.encode())
    draw_comparison(comparison, out / "figure.png")
    return table
