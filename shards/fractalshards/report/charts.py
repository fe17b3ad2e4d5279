"""Bar charts as plain data, for a template to draw: no text is made into markup here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fractalshards.human import human_count

WIDTH, HEIGHT = 1000, 100  # of the drawing; it is stretched to the room there is
_MAX_BARS = 250
_BINS = 25
_MAX_TALLY = 15


@dataclass(frozen=True)
class Bar:
    """A bar from the bottom of the drawing, in its units, and what it says when pointed at."""

    x: float
    width: float
    height: float
    tip: str


@dataclass(frozen=True)
class Chart:
    """A bar chart. ``top`` is its height; ``ticks`` spread from its left to its right edge, or below ``each`` bar."""

    title: str
    note: str
    bars: tuple[Bar, ...]
    top: str
    ticks: tuple[str, ...]
    each: bool = False


def class_chart(title: str, counts: npt.NDArray[np.int64]) -> Chart:
    """Images by class: a bar for each, or the mean of neighbours where there are many.

    Args:
        counts: (classes,) images that show each class.
    """
    group = -(-len(counts) // _MAX_BARS)
    starts = range(0, len(counts), group)
    means = [float(counts[start : start + group].mean()) for start in starts]
    names = [_class_range(start, min(start + group, len(counts)) - 1) for start in starts]
    tips = [f"{name}: {mean:,.4g} images" for name, mean in zip(names, means, strict=True)]
    low, high = int(counts.min()), int(counts.max())
    same = f"Every class has {human_count(low, 'image')}." if low == high else ""
    note = same or f"From {low:,} to {human_count(high, 'image')} per class, median {np.median(counts):,.4g}."
    if empty := int((counts == 0).sum()):
        note += f" {human_count(empty, 'class').replace('classs', 'classes')} without any."
    if group > 1:
        note += f" A bar is the mean of {group} classes that follow each other."
    ticks = ("class 0", f"class {len(counts) - 1:,}") if len(counts) > 1 else ("class 0",)
    return Chart(title, note, _bars(means, tips), f"{max(means):,.4g}", ticks)


def histogram(
    title: str, note: str, values: Sequence[float], edge: tuple[float, float], show: Callable[[float], str]
) -> Chart:
    """How values are distributed.

    Args:
        edge: lowest and highest value of the axis; values lie between them.
        show: a value as text.
    """
    shares, edges = np.histogram(values, _BINS, edge)
    tips = [
        f"{show(low)} to {show(high)}: {human_count(int(count), 'image')}"
        for low, high, count in zip(edges[:-1].tolist(), edges[1:].tolist(), shares.tolist(), strict=True)
    ]
    low, median, high = np.percentile(values, [5, 50, 95])
    said = f"Median {show(median)}; nine of ten images from {show(low)} to {show(high)}."
    ticks = tuple(show(value) for value in np.linspace(*edge, 3))
    return Chart(title, f"{said} {note}".strip(), _bars(shares.tolist(), tips), f"{int(shares.max()):,}", ticks)


def tally(title: str, values: Sequence[int]) -> Chart:
    """How often each small number occurs; those from ``_MAX_TALLY`` on are one bar."""
    counts = np.bincount(np.minimum(values, _MAX_TALLY), minlength=2)
    names = [f"{number} or more" if number == _MAX_TALLY else str(number) for number in range(len(counts))]
    tips = [f"{name}: {human_count(count, 'image')}" for name, count in zip(names, counts.tolist(), strict=True)]
    note = f"{min(values)} to {max(values)}, mean {np.mean(values):.3g}."
    return Chart(title, note, _bars(counts.tolist(), tips), f"{int(counts.max()):,}", tuple(names), each=True)


def _class_range(first: int, last: int) -> str:
    return f"class {first:,}" if first == last else f"classes {first:,} to {last:,}"


def _bars(values: Sequence[float], tips: Sequence[str]) -> tuple[Bar, ...]:
    step = WIDTH / len(values)
    highest = max(values) or 1
    gap = 0 if len(values) > 100 else min(step * 0.12, 4)  # many bars are an area
    return tuple(
        Bar(round(number * step + gap / 2, 2), round(step - gap, 2), round(HEIGHT * value / highest, 2), tip)
        for number, (value, tip) in enumerate(zip(values, tips, strict=True))
    )
