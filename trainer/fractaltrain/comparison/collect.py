"""Finds fine-tuning runs and gathers them into cells: what was fine-tuned on, the model, and what came before."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from fractalshards.errors import FractalError
from fractalshards.fields import MAX_JSON_BYTES
from fractalshards.files import read_bounded
from fractaltrain.run_folder import RESULT, RUN, read_settings

_ENDING = re.compile(r"--(?P<row>.+?)--.+--seed\d+")  # as a study calls its runs


@dataclass(frozen=True)
class Run:
    """A finished fine-tuning; accuracies are shares in [0, 1]."""

    folder: Path
    target: str
    model: str
    pretraining: str
    seeds: tuple[int, int]
    top1: float
    best_top1: float


@dataclass(frozen=True)
class Score:
    """Accuracy in per cent over ``n`` runs; ``std`` is that of a sample, None for a single run."""

    n: int
    mean: float
    std: float | None

    @classmethod
    def of(cls, shares: Sequence[float]) -> "Score":
        """The score of shares in [0, 1], one or more."""
        values = [100 * share for share in shares]
        return cls(len(values), mean(values), stdev(values) if len(values) > 1 else None)


def find_runs(paths: Sequence[Path]) -> tuple[Run, ...]:
    """All finished fine-tunings in folders, by name.

    Raises:
        FractalError: if there is none, or two of them have the same cell and seeds.
    """
    folders = sorted({file.parent.resolve() for path in paths for file in path.rglob(RESULT)})
    runs = [run for folder in folders if (run := _read(folder))]
    if not runs:
        raise FractalError(f"{', '.join(map(str, paths))}: no finished fine-tuning run; check the path")
    seen: dict[tuple[object, ...], Run] = {}
    for run in runs:
        other = seen.setdefault((run.target, run.model, run.pretraining, run.seeds), run)
        if other is not run:
            raise FractalError(f"{other.folder} and {run.folder} are the same cell with the same seeds; leave one out")
    return tuple(runs)


def _read(folder: Path) -> Run | None:
    if not (folder / RUN).is_file():
        return None
    settings, result = read_settings(folder), json.loads(read_bounded(folder / RESULT, MAX_JSON_BYTES))
    if settings.get("task") != "ft" or not isinstance(result.get("top1"), float):
        return None
    few = "" if settings.get("per_class") is None else f", {settings['per_class']} per class"
    named = _ENDING.search(folder.name)
    fallback = "scratch" if settings.get("weights") is None else folder.name
    return Run(
        folder=folder,
        target=f"{settings.get('data')}{few}",
        model=str(settings.get("model")),
        pretraining=named["row"] if named else fallback,
        seeds=(int(settings.get("seed", 0)), int(settings.get("subset_seed", 0))),
        top1=float(result["top1"]),
        best_top1=float(result.get("best_top1", result["top1"])),
    )
