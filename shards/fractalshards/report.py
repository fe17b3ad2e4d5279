"""Render the survey of a dataset as one HTML page that loads nothing: samples, distributions, recipe, digests."""

import base64
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from fractalshards.errors import needs_extra
from fractalshards.human import human_bytes, human_count, one_line
from fractalshards.manifest import Manifest
from fractalshards.recipe_file import flat_recipe
from fractalshards.survey import Counts, Survey

if TYPE_CHECKING:
    import jinja2

_MAX_BARS = 250
_BINS = 25
_MAX_TALLY = 15
_MAX_SHARDS = 500  # rows of the table of shards
_MAX_ROWS = 200  # of the recipe
_MAX_TEXT = 200  # characters of a text from the dataset
_MAX_NAME = 60
_BLACK_GROUND = 0.98  # images with a background have at least this share of pixels that are not black


@dataclass(frozen=True)
class Chart:
    """A bar chart with names for tooltips; ``ticks`` are spread over its width, or below ``each`` bar."""

    title: str
    note: str
    values: Sequence[float]
    names: Sequence[str]
    ticks: Sequence[str]
    each: bool = False


def class_chart(title: str, counts: Counts) -> Chart:
    """Chart the images of each class; with many classes, a bar is the mean of neighbours."""
    group = -(-len(counts) // _MAX_BARS)
    parts = {start: counts[start : start + group] for start in range(0, len(counts), group)}
    means = [float(part.mean()) for part in parts.values()]
    names = [
        f"class {start:,}" if group == 1 else f"classes {start:,} to {start + len(part) - 1:,}"
        for start, part in parts.items()
    ]
    low, high = int(counts.min()), int(counts.max())
    note = f"{low:,} to {human_count(high, 'image')} per class, median {np.median(counts):,.4g}."
    if low == high:
        note = f"Every class has {human_count(low, 'image')}."
    if empty := int((counts == 0).sum()):
        note += f" {empty:,} without images."
    if group > 1:
        note += f" Each bar is the mean of {group} neighbouring classes."
    ticks = ("class 0", f"class {len(counts) - 1:,}") if len(counts) > 1 else ("class 0",)
    return Chart(title, note, means, names, ticks)


def histogram(
    title: str, note: str, values: Sequence[float], show: Callable[[float], str], highest: float = 1
) -> Chart:
    """Chart how many images have a value in each of 25 bins from 0 to ``highest``; ``show`` formats a value."""
    counts, edges = np.histogram(values, _BINS, (0, highest))
    names = [f"{show(low)} to {show(high)}" for low, high in pairwise(edges.tolist())]
    low, median, high = map(show, np.percentile(values, [5, 50, 95]))
    ticks = tuple(show(value) for value in (0, highest / 2, highest))
    note = f"Median {median}; 90 % of the images are between {low} and {high}. {note}".strip()
    return Chart(title, note, counts.tolist(), names, ticks)


def tally(title: str, values: Sequence[int]) -> Chart:
    """Chart how often each small number occurs; large ones share a bar."""
    counts = np.bincount(np.minimum(values, _MAX_TALLY), minlength=2).tolist()
    names = [f"{number} or more" if number == _MAX_TALLY else str(number) for number in range(len(counts))]
    note = f"{min(values)} to {max(values)}, mean {np.mean(values):.3g}."
    return Chart(title, note, counts, names, names, each=True)


def load_template() -> "jinja2.Template":
    """Load the template of the page; raises FractalError if jinja2 is not installed."""
    with needs_extra("report", "a report"):
        import jinja2
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "base64": lambda data: base64.b64encode(data).decode(),
        "bytes": human_bytes,
        "name": lambda name: _clean(name, _MAX_NAME),
        "text": _clean,
    }
    return environment.from_string(_read_file("report.html.jinja"))


def render_page(template: "jinja2.Template", survey: Survey) -> str:
    """Render the page as HTML; the template escapes all text, because text from a dataset is not trusted."""
    from markupsafe import Markup  # installed with jinja2

    manifest = survey.manifest
    style, script = _read_file("report.css"), _read_file("report.js")
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    systems = manifest.recipe.get("systems_digest")
    return template.render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        title=manifest.folder.resolve().name,
        facts={
            "images": f"{sum(map(manifest.samples, manifest.splits)):,}",
            "classes": f"{manifest.classes:,}",
            "pixels": f"{side} × {side}" if (side := manifest.image_size) else "several sizes",
            "labels": "one per image" if manifest.label_type == "single" else "one or more per image",
            "shards": f"{len(shards):,}",
            "size": human_bytes(manifest.bytes()),
        },
        charts=_charts(survey),
        sizes=Counter(f"{one.width} × {one.height}" for one in survey.stats).most_common(8),
        survey=survey,
        manifest=manifest,
        recipe={
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for name, value in list(flat_recipe(manifest.recipe).items())[:_MAX_ROWS]
        },
        software={**dict(list(manifest.software.items())[:_MAX_ROWS]), "shard format": manifest.format_version},
        digests={
            "Content: identifies the dataset": manifest.content_digest(),
            "Recipe": manifest.recipe_digest,
            **({"Systems": systems} if isinstance(systems, str) else {}),
        },
        shards=shards[:_MAX_SHARDS],
        shard_count=len(shards),
        commands=_commands(manifest),
    )


def _charts(survey: Survey) -> list[Chart]:
    stats = survey.stats
    charts = [
        class_chart(f"Images per class, {split}", counts) for split, counts in survey.counts.items() if counts.any()
    ]
    fills = [one.fill for one in stats]
    if np.percentile(fills, 10) < _BLACK_GROUND:
        charts.append(histogram("Fill rate", "Share of pixels that are not black.", fills, "{:.1%}".format))
    if survey.manifest.label_type == "multi":
        charts.append(tally("Objects per image", [one.objects for one in stats]))
    sizes = [float(one.bytes) for one in stats]
    return [*charts, histogram("Bytes per sample", "Image, label and tar headers.", sizes, human_bytes, max(sizes))]


def _commands(manifest: Manifest) -> dict[str, str]:
    """Return command lines to copy, by what they are for."""
    paths = (str(manifest.folder), manifest.folder.resolve().name)
    here, name = (shlex.quote(path.encode(errors="replace").decode()) for path in paths)  # a page holds UTF-8 only
    commands = {
        "Check hashes, labels and every image": f"fractalshards verify {here}",
        "Upload it": f"fractalshards push {here} URL",
        "Download it elsewhere": f"fractalshards pull URL {name}",
    }
    if isinstance(manifest.recipe.get("systems_digest"), str):  # the images were rendered
        commands["Or send the recipe, a small file"] = f"fractalshards recipe {here} > recipe.json"
        commands["Render the same images from it"] = "fractalgen build --recipe recipe.json"
    return commands


def _read_file(name: str) -> str:
    return files("fractalshards").joinpath("templates", name).read_text("utf-8")


def _csp_hash(text: str) -> str:
    """Hash an inline script or style for the page's Content-Security-Policy, which allows no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _clean(text: object, most: int = _MAX_TEXT) -> str:
    """Shorten untrusted text to one line without control characters or characters that change its direction."""
    line = one_line(str(text)[: 4 * most])
    return line if len(line) <= most else line[: most - 1] + "…"
