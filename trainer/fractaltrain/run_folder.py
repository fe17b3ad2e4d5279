"""A run's folder: ``run.json`` says what it is, ``metrics.jsonl`` how it went, ``result.json`` how it ended."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fractalshards.errors import FractalError
from fractalshards.fields import Fields
from fractalshards.human import human_count
from fractalshards.storage import atomic_file, remove_leftovers, write_json
from fractaltrain.config import Resume

RUN = "run.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"

_DAMAGED = "the file is damaged; choose another run, or remove this one's folder and train it again"


def open_run(
    folder: Path, settings: Mapping[str, Any], environment: Mapping[str, Any], resume: Resume = "auto"
) -> None:
    """Make the folder and its ``run.json``, or find the same run there.

    Args:
        settings: JSON-like; all that decides what the run computes, and nothing else.
        environment: JSON-like; written for the record.

    Raises:
        FractalError: if the folder holds a run with other settings, or any at all that shall not be continued, or
            none that must be.
        OSError: if it cannot be written.
    """
    there = (folder / RUN).exists()
    if there and resume == "never":
        raise FractalError(f"{folder}: holds a run already; choose another folder with --out, or drop --resume never")
    if not there and resume == "must":
        raise FractalError(f"{folder}: no run to continue; check --out, or drop --resume must")
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    if not there:
        write_json(folder / RUN, {"settings": settings, "environment": environment}, indent=1)
        return
    found, wanted = read_settings(folder), flatten(settings)
    differing = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if differing:
        others = f", and {human_count(len(differing) - 1, 'other difference')}" if differing[1:] else ""
        raise FractalError(
            f"{folder}: holds a run {difference(differing[0], found, wanted)}{others}; "
            "choose another folder with --out, or remove this one"
        )


def difference(name: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """A setting of a run that is not as wanted, in words: ``with seed 0, not 1``, ``without ema, not with 0.9``."""
    has, wants = found.get(name), wanted.get(name)
    if has is None:
        return f"without {name}, not with {wants}"
    return f"with {name} {has}, " + ("not without" if wants is None else f"not {wants}")


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings in the ``run.json`` of a run, flattened.

    Raises:
        FractalError: if it is damaged.
        OSError: if it cannot be read.
    """
    return flatten(Fields.read(folder / RUN, _DAMAGED).mapping("settings"))


def settings_of(folder: Path) -> Fields:
    """The settings in the ``run.json`` of a run, each still to be checked.

    Raises:
        FractalError: if the folder holds no run, or its ``run.json`` is damaged.
    """
    path = folder / RUN
    if not path.is_file():
        raise FractalError(f"{folder}: no {RUN}, so not the folder of a run; check the path")
    return Fields.read(path, _DAMAGED).inner("settings")


def trained_model(folder: Path) -> tuple[str, int]:
    """Name of the model that a run trains, and the side in pixels of the images it sees.

    Raises:
        FractalError: if the folder holds no run, or its ``run.json`` is damaged.
    """
    settings = settings_of(folder)
    return settings.text("model"), settings.count("image_size")


def append_metrics(folder: Path, line: Mapping[str, Any]) -> None:
    """Add a line to ``metrics.jsonl``; ``line`` has ``global_step``, the optimiser steps done since the start."""
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of ``metrics.jsonl``; one that was cut off by a kill is left out."""
    path = folder / METRICS
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def rewind_metrics(folder: Path, global_step: int) -> None:
    """Remove the lines after ``global_step``, which a resumed run will write again."""
    kept = [line for line in read_metrics(folder) if line["global_step"] <= global_step]
    with atomic_file(folder / METRICS) as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in kept)


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write ``result.json``."""
    write_json(folder / RESULT, result, indent=1)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"recipe": {"lr": 1}}`` to ``{"recipe.lr": 1}``; tuples become the lists that JSON makes of them."""
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(settings)).items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
