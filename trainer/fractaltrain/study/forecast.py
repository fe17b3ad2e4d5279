"""What ``fractaltrain study --dry-run`` prints: what is done and to do, what it costs, and all command lines."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fractalshards.human import human_count, human_seconds
from fractaltrain.study.cost import Cost, Size, Total, step_cost
from fractaltrain.study.plan import Group, Step
from fractaltrain.study.run import standings

_HEAD = ("pre-training", "model", "seed", "to do", "images", "training")
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class _Priced:
    step: Step
    done: bool
    problem: str | None
    cost: Cost


def describe(
    groups: Sequence[Group], folder: Path, sizes: Mapping[str, Size], speeds: Mapping[str, float]
) -> Iterator[str]:
    """A table of the groups and its total, both of what is to do; then every step with its command line.

    Args:
        sizes: as ``find_sizes`` gives them.
        speeds: as ``find_speeds`` gives them.
    """
    priced = [
        [_Priced(*standing, step_cost(standing.step, sizes, speeds)) for standing in standings(group, folder)]
        for group in groups
    ]
    rows = [_HEAD]
    for steps in priced:
        first, left = steps[0].step, _to_do(steps)
        number = f"{len(left)} of {len(steps)}"
        rows.append((first.pretraining, first.model, str(first.seed), number, *_shown(step.cost for step in left)))
    yield from _aligned(rows)
    everything = [step for steps in priced for step in steps]
    left = _to_do(everything)
    yield ""
    yield _total_line(len(left), len(everything), Total.of(step.cost for step in left))
    yield ""
    for step in everything:
        images, seconds = _shown([step.cost])
        state = f"not usable: {step.problem}" if step.problem else "done" if step.done else "to do"
        yield f"# {step.step.run}: {state}; images: {images}, training: {seconds}"
        yield f"fractaltrain {shlex.join(step.step.arguments)}"


def _to_do(steps: Iterable[_Priced]) -> list[_Priced]:
    return [step for step in steps if not step.done]


def _shown(costs: Iterable[Cost]) -> tuple[str, str]:
    """Images and time."""
    total = Total.of(costs)
    return (
        _partly(f"{total.images:,}", total.unknown_images, total.steps),
        _partly(human_seconds(total.seconds), total.unknown_seconds, total.steps),
    )


def _partly(known: str, unknown: int, steps: int) -> str:
    """A sum over steps, of which some or all may be unknown."""
    if unknown and unknown == steps:
        return _UNKNOWN
    return f"{known} + ?" if unknown else known


def _total_line(left: int, steps: int, total: Total) -> str:
    if not left:
        return f"all {human_count(steps, 'step')} done"
    images = "unknown" if total.unknown_images == left else f"{total.images:,}"
    seconds = (
        "unknown" if total.unknown_seconds == left else f"{human_seconds(total.seconds)} at the speed of runs here"
    )
    return (
        f"{left:,} of {human_count(steps, 'step')} to do; images: {images}{_besides(total.unknown_images, left)}; "
        f"training: {seconds}{_besides(total.unknown_seconds, left)}"
    )


def _besides(unknown: int, of: int) -> str:
    return f" and {human_count(unknown, 'unknown step')}" if 0 < unknown < of else ""


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Columns of equal width; all but the first two are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (text.ljust(width) if place < 2 else text.rjust(width)
                 for place, (text, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        yield "  ".join(cells).rstrip()
