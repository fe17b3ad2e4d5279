"""How large a dataset will be and how long it takes: measured on a few of its own samples before any is written."""

import errno
import os
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from fractalgen.color import pixels_of
from fractalgen.deflate import encode_image
from fractalgen.plan import locate
from fractalgen.recipe import Recipe
from fractalgen.render import render_unit
from fractalshards.console import notice
from fractalshards.errors import FractalError
from fractalshards.human import human_bytes, human_seconds
from fractalshards.names import sample_key
from fractalshards.systems import Systems
from fractalshards.writer import pack_rendered

_PROBES = 32
_PROBE_SECONDS = 3.0
_MARGIN = 1.05


@dataclass(frozen=True)
class Forecast:
    """Expected cost of ``samples`` samples: bytes on disk, and seconds with the workers that were named."""

    samples: int
    bytes: float
    seconds: float

    def __str__(self) -> str:
        return f"about {human_bytes(self.bytes)}, about {human_seconds(self.seconds)}"


def forecast(recipe: Recipe, systems: Systems, samples: int, workers: int) -> Forecast:
    """Measure a few units, spread over the dataset, and extrapolate to ``samples`` samples.

    The median of their times counts, for some may pay for compilation, once after an install.
    """
    total = recipe.n + recipe.val
    with notice("getting ready; the first run after an install compiles ..."):
        _stored_bytes(recipe, systems, 0)
    sizes: list[int] = []
    seconds: list[float] = []
    while len(seconds) < min(_PROBES, total) and sum(seconds) < _PROBE_SECONDS:
        start = time.perf_counter()
        unit = _stored_bytes(recipe, systems, len(seconds) * total // min(_PROBES, total))
        seconds.append((time.perf_counter() - start) / len(unit))
        sizes += unit
    return Forecast(samples, samples * statistics.mean(sizes), samples * statistics.median(seconds) / workers)


def check_space(folder: Path, expected: Forecast) -> None:
    """Refuse a build that the disk cannot hold.

    Raises:
        OSError: if nothing can be written there at all.
        FractalError: if the expected bytes, with 5 % to spare, exceed what is free where the folder is or will be.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not os.access(existing, os.W_OK, effective_ids=True):
        number = errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(number, os.strerror(number), str(existing))
    total, _, free = shutil.disk_usage(existing)
    if total and expected.bytes * _MARGIN > free:
        raise FractalError(
            f"{folder}: needs about {human_bytes(expected.bytes)}, the disk has {human_bytes(free)} free; "
            "free some space, choose another --out, or ask for fewer or smaller images"
        )


def _stored_bytes(recipe: Recipe, systems: Systems, index: int) -> list[int]:
    """Bytes that each sample of a sample's unit takes in its shard, all work done that a build does on them."""
    images = render_unit(recipe, systems, locate(recipe, index).unit)
    for image, _ in images:
        pixels_of(image)
    return [len(pack_rendered(sample_key(index), rendered, encode_image)) for rendered in images]
