"""The report of a dataset: one HTML page with everything in it, which asks for nothing from anywhere."""

import base64
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fractalshards.errors import UsageError
from fractalshards.extras import needs_extra
from fractalshards.human import human_bytes, human_count, one_line
from fractalshards.manifest import Manifest
from fractalshards.recipes import flat_recipe
from fractalshards.report.charts import Chart, class_chart, histogram, tally
from fractalshards.report.looks import DETAIL, Look
from fractalshards.report.survey import Survey

if TYPE_CHECKING:
    import jinja2

_MAX_SHARDS = 500  # rows of the table of shards
_MAX_ROWS = 200  # of the recipe
_MAX_TEXT = 200  # letters of a foreign text
_MAX_NAME = 60
_BLACK_GROUND = 0.98  # images with a background have no fewer pixels that are not black


@dataclass(frozen=True)
class Command:
    """A command line to copy, and what it is for."""

    what: str
    line: str


def load_template() -> "jinja2.Template":
    """The template of the page.

    Raises:
        FractalError: if jinja2 is not installed.
    """
    with needs_extra("report", "a report"):
        import jinja2
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.from_string(_template_file("report.html.jinja"))


def check_page_name(path: Path) -> None:
    """Raise a UsageError unless the name is that of a page."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out is {path}: expected a name that ends in .html")


def render_page(template: "jinja2.Template", survey: Survey) -> str:
    """The page as HTML. Texts of the dataset come from outside: the template escapes all of them."""
    from markupsafe import Markup  # jinja2 brings it along

    manifest = survey.manifest
    style, script = _template_file("report.css"), _template_file("report.js")
    return template.render(
        style=Markup(style),
        script=Markup(script),
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        title=_text(manifest.folder.resolve().name),
        facts=_facts(survey),
        charts=_charts(survey),
        sizes=_sizes(survey.looks),
        survey=survey,
        manifest=manifest,
        names=[_text(name, _MAX_NAME) for name in manifest.class_names],
        ids=[_text(name, _MAX_NAME) for name in manifest.class_ids],
        looked=human_count(len(survey.looks), "image"),
        recipe=list(_recipe_rows(manifest))[:_MAX_ROWS],
        software=[(_text(name), _text(str(value))) for name, value in list(manifest.software.items())[:_MAX_ROWS]],
        digests=_digests(manifest),
        shards=[shard for shards in manifest.splits.values() for shard in shards][:_MAX_SHARDS],
        shard_count=sum(map(len, manifest.splits.values())),
        commands=_commands(manifest),
        human_bytes=human_bytes,
        text=_text,
    )


def _template_file(name: str) -> str:
    return files("fractalshards.report").joinpath("templates", name).read_text("utf-8")


def _csp_hash(text: str) -> str:
    """What a Content-Security-Policy calls an inline script or style, so that no other may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _text(text: str, most: int = _MAX_TEXT) -> str:
    """Foreign text on one line, without what could change the direction of writing, and not too long."""
    line = one_line(text[: 4 * most])
    return line if len(line) <= most else line[: most - 1] + "…"


def _facts(survey: Survey) -> list[tuple[str, str]]:
    manifest = survey.manifest
    images = sum(map(manifest.samples, manifest.splits))
    side = manifest.image_size
    return [
        ("images", f"{images:,}"),
        ("classes", f"{manifest.classes:,}"),
        ("pixels", f"{side} × {side}" if side else "of several sizes"),
        ("labels", "one per image" if manifest.label_type == "single" else "one or more per image"),
        ("shards", f"{sum(map(len, manifest.splits.values())):,}"),
        ("size", human_bytes(manifest.bytes())),
    ]


def _charts(survey: Survey) -> list[Chart]:
    looks = survey.looks
    fills = [look.fill for look in looks]
    charts = [
        class_chart(f"Images per class, {_text(split)}", counts)
        for split, counts in survey.label_counts.items()
        if survey.manifest.samples(split)
    ]
    if np.percentile(fills, 10) < _BLACK_GROUND:
        note = "The share of pixels that are not black: FractalDB's fill rate."
        charts.append(histogram("Fill rate", note, fills, (0, 1), _percent))
    else:
        charts.append(histogram("Detail rate", _detail_note(), [look.detail for look in looks], (0, 1), _percent))
    if survey.manifest.label_type == "multi":
        charts += [
            histogram(
                "Share in boxes",
                "The share of an image that lies in the box of an object.",
                [look.covered for look in looks],
                (0, 1),
                _percent,
            ),
            tally("Objects per image", [look.objects for look in looks]),
        ]
    sizes = [float(look.bytes) for look in looks]
    return [
        *charts,
        histogram("Bytes per sample", "Image, label and tar headers.", sizes, (0, max(sizes)), human_bytes),
    ]


def _detail_note() -> str:
    return (
        f"The share of pixels that differ from a neighbour by more than {DETAIL} of 255 in a colour. These images have "
        "backgrounds, so hardly a pixel is black, and what share the fractal itself covers cannot be read back from "
        "them; this tells empty and plain images from full ones."
    )


def _sizes(looks: Sequence[Look]) -> list[tuple[str, str]]:
    """The commonest image sizes, and how common they are."""
    counts = Counter((look.width, look.height) for look in looks)
    return [(f"{width} × {height}", _percent(count / len(looks))) for (width, height), count in counts.most_common(8)]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _recipe_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for name, value in flat_recipe(manifest.recipe).items():
        yield _text(name), _text(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _digests(manifest: Manifest) -> list[tuple[str, str]]:
    systems = manifest.recipe.get("systems_digest")
    return [
        ("content, identifies the dataset", manifest.content_digest()),
        ("recipe", _text(manifest.recipe_digest)),
        *([("systems", _text(systems))] if isinstance(systems, str) else []),
    ]


def _commands(manifest: Manifest) -> list[Command]:
    here, name = map(_argument, (str(manifest.folder), manifest.folder.resolve().name))
    share = [
        Command("Check it: hashes, labels, every image", f"fractalshards verify {here}"),
        Command("Put it where others can get it", f"fractalshards push {here} URL"),
        Command("Get it there", f"fractalshards pull URL {name}"),
    ]
    if not isinstance(manifest.recipe.get("systems_digest"), str):
        return share  # its images were not rendered
    return [
        *share,
        Command("Or send the recipe, a small file", f"fractalshards recipe {here} > recipe.json"),
        Command("And render the same images from it", "fractalgen build --recipe recipe.json"),
    ]


def _argument(path: str) -> str:
    """A path as one would type it; what is no Unicode in it cannot stand in a page."""
    return shlex.quote(path.encode(errors="replace").decode())
