"""Bar charts as plain data, for a template to draw: no text is made into markup here."""

import base64
import hashlib
import io
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from fractalshards.console import old_progress as progress
from fractalshards.errors import FractalError, UsageError, needs_extra
from fractalshards.human import human_bytes, human_count, one_line
from fractalshards.manifest import MAX_SAMPLES, TRAINING, Manifest, Shard, flat_recipe, read_record
from fractalshards.png import Pixels
from fractalshards.reader import ShardIndex, decode_sample, read_sample
from fractalshards.sample import BLOCK, Label, MultiLabel, Object, classes_of, decode_label, first_member_end
from fractalshards.storage import regular_size
from fractalshards.workers import worker_pool

if TYPE_CHECKING:
    import jinja2


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


MAX_OBJECTS = 8  # boxes kept with a thumbnail
DETAIL = 32  # of 255: the difference between neighbours that counts as detail
_QUALITY = 75


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of a sample: WebP, of an image of ``width`` x ``height`` pixels with these objects, if any."""

    key: str
    width: int
    height: int
    webp: bytes
    objects: tuple[Object, ...]


@dataclass(frozen=True)
class Look:
    """Measures of one image.

    Attributes:
        width, height: in pixels.
        bytes: of the sample in its tar, headers included.
        fill: share of pixels that are not black; what FractalDB calls fill rate.
        detail: share of pixels that differ from one of their four neighbours by more than ``DETAIL`` in a channel.
        objects: objects in the label; 0 for label type ``single``.
        covered: share of the image that lies in the box of an object.
    """

    width: int
    height: int
    bytes: int
    fill: float
    detail: float
    objects: int
    covered: float


@dataclass(frozen=True)
class LookTask:
    """What to take from a shard: so many thumbnails by class, measures of these samples by position in the shard."""

    index: ShardIndex
    wanted: Mapping[int, int]
    looked: Sequence[int]
    classes: int
    tile: int


@dataclass(frozen=True)
class ShardLooks:
    """What was taken from a shard: (class, thumbnail) pairs, and measures."""

    thumbnails: tuple[tuple[int, Thumbnail], ...]
    looks: tuple[Look, ...]


def look_at_shard(task: LookTask) -> ShardLooks:
    """Take from a shard what the task asks for; fewer thumbnails where it has not as many samples of a class.

    Of the samples of a class those are taken that lie evenly spread over the shard.

    Raises:
        FractalError: if a sample cannot be read, naming it.
        OSError: if the shard cannot be read.
    """
    with task.index.path.open("rb") as file:
        reader = _Reader(task, file.fileno())
        chosen = _choose(reader, task) if task.wanted else ()
        looks = tuple(reader.look(position) for position in task.looked)
        return ShardLooks(tuple((label, reader.thumbnail(position)) for label, position in chosen), looks)


def measure(image: Pixels, label: Label, size: int) -> Look:
    """Measure an image (H, W, 3) uint8, whose sample takes ``size`` bytes."""
    height, width, _ = image.shape
    objects = label.objects if isinstance(label, MultiLabel) else ()
    covered = np.zeros((height, width), bool)
    for thing in objects:
        x, y, box_width, box_height = thing.bbox
        covered[y : y + box_height, x : x + box_width] = True
    return Look(
        width=width,
        height=height,
        bytes=size,
        fill=float(image.any(axis=2).mean()),
        detail=float(_detail(image).mean()),
        objects=len(objects),
        covered=float(covered.mean()),
    )


def shrink(image: Pixels, tile: int) -> bytes:
    """An image as WebP that fits into ``tile`` x ``tile`` pixels; a smaller one stays as it is."""
    picture = Image.fromarray(image)
    picture.thumbnail((tile, tile), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=_QUALITY)
    return stream.getvalue()


class _Reader:
    """An open shard; its errors name the shard and the sample."""

    def __init__(self, task: LookTask, descriptor: int) -> None:
        self._task = task
        self._descriptor = descriptor
        self._bounds = task.index.offsets.tolist()

    def labels(self) -> list[Label]:
        """The labels of all samples; their images are not read where the image comes first, as in our shards."""
        return [self._label(position) for position in range(len(self._bounds) - 1)]

    def look(self, position: int) -> Look:
        """Measures of a sample."""
        _, image, label = self._decode(position)
        return measure(image, label, self._bounds[position + 1] - self._bounds[position])

    def thumbnail(self, position: int) -> Thumbnail:
        """A small picture of a sample."""
        key, image, label = self._decode(position)
        height, width, _ = image.shape
        objects = label.objects[:MAX_OBJECTS] if isinstance(label, MultiLabel) else ()
        clipped = tuple(Object(thing.label, _clip(thing.bbox, width, height)) for thing in objects)
        return Thumbnail(key, width, height, shrink(image, self._task.tile), clipped)

    def _label(self, position: int) -> Label:
        start, end = self._bounds[position : position + 2]
        try:
            second = start + first_member_end(os.pread(self._descriptor, BLOCK, start))
            sample = read_sample(self._descriptor, second if second < end else start, end)
            if len(sample.files) > 1 or sample.files.keys().isdisjoint(("cls", "json")):
                sample = read_sample(self._descriptor, start, end)
            return decode_label(sample.files)
        except FractalError as error:
            raise self._failure(position, error) from error

    def _decode(self, position: int) -> tuple[str, Pixels, Label]:
        start, end = self._bounds[position : position + 2]
        try:
            sample = read_sample(self._descriptor, start, end)
            return sample.key, *decode_sample(sample, self._task.classes)
        except FractalError as error:
            raise self._failure(position, error) from error

    def _failure(self, position: int, error: FractalError) -> FractalError:
        path = self._task.index.path
        return FractalError(f"{path}: sample {position}: {error}; see 'fractalshards verify', fetch or build it again")


def _choose(reader: _Reader, task: LookTask) -> list[tuple[int, int]]:
    """(class, position) of the samples to show."""
    places: dict[int, list[int]] = {label: [] for label in task.wanted}
    for position, label in enumerate(reader.labels()):
        for one in classes_of(label):
            if one in places:
                places[one].append(position)
    return [(label, at) for label, found in places.items() for at in _spread(found, task.wanted[label])]


def _spread(places: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of some places, evenly spread."""
    if len(places) <= count:
        return list(places)
    return [places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count)]


def _detail(image: Pixels) -> npt.NDArray[np.bool_]:
    """Where an image differs from a neighbour, (H, W) bool."""
    found = np.zeros(image.shape[:2], np.bool_)
    for axis in (0, 1):
        rows = np.moveaxis(image, axis, 0)
        before, after = rows[:-1], rows[1:]  # differences of wider integers would take twice the memory of an image
        steps = (np.maximum(before, after) - np.minimum(before, after) > DETAIL).any(axis=2)
        along = np.moveaxis(found, axis, 0)
        along[1:] |= steps
        along[:-1] |= steps
    return found


def _clip(bbox: tuple[int, int, int, int], width: int, height: int) -> tuple[int, int, int, int]:
    x, y, box_width, box_height = bbox
    left, top = min(x, width), min(y, height)
    return left, top, min(box_width, width - left), min(box_height, height - top)


MAX_LOOKS = 2000  # images measured
MAX_THUMBNAILS = 4000
MAX_THUMBNAIL_BYTES = 5_000_000  # of all together; base64 makes 6.7 MB of them
_PER_CLASS = 8
_LARGE, _SMALL = 96, 64  # pixels of a thumbnail
_MAX_LARGE = 800  # so many thumbnails are large
_GOLDEN = 0.6180339887498949

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassView:
    """A class: its index, how many images of the surveyed split show it, and a few of them."""

    index: int
    count: int
    thumbnails: tuple[Thumbnail, ...]


@dataclass(frozen=True)
class Survey:
    """What was seen of a dataset.

    Attributes:
        split: the one that thumbnails and measures are from: ``train``, or the first.
        label_counts: images that show each class, (classes,) int64, by split; exact.
        views: the classes shown, all of them up to ``MAX_THUMBNAILS``, else evenly spread ones.
        looks: measures of up to ``MAX_LOOKS`` images, evenly spread.
        tile: pixels that a thumbnail fits into.
    """

    manifest: Manifest
    split: str
    label_counts: Mapping[str, Counts]
    views: tuple[ClassView, ...]
    looks: tuple[Look, ...]
    tile: int


def survey_dataset(manifest: Manifest, workers: int) -> Survey:
    """Survey a dataset, with progress on stderr.

    Reads all sidecars, the labels of as many shards as it takes to find images of every class, and the images it
    shows or measures.

    Raises:
        FractalError: if there is no image, or a sidecar or sample is damaged.
        OSError: if a file cannot be read.
    """
    split = TRAINING if TRAINING in manifest.splits else next(iter(manifest.splits), "")
    if not split or not manifest.samples(split):
        raise FractalError(f"{manifest.folder}: no image in it, so there is nothing to report; build or fetch it again")
    if manifest.samples(split) > MAX_SAMPLES:
        raise FractalError(f"{manifest.folder}: more samples than keys of nine digits; fetch or build it again")
    shown = spread(manifest.classes, MAX_THUMBNAILS)
    per_class = min(_PER_CLASS, MAX_THUMBNAILS // len(shown))
    tile = _LARGE if len(shown) * per_class <= _MAX_LARGE else _SMALL
    plan = _Plan(manifest, split, shown, per_class, tile)
    label_counts = _read_sidecars(manifest, plan)
    found = _run(plan.tasks(), workers)
    thumbnails: dict[int, list[Thumbnail]] = {label: [] for label in shown}
    for taken in found:
        for label, thumbnail in taken.thumbnails:
            thumbnails[label].append(thumbnail)
    counts = label_counts[split]
    views = tuple(ClassView(label, int(counts[label]), tuple(thumbnails[label])) for label in shown)
    looks = tuple(look for taken in found for look in taken.looks)
    return Survey(manifest, split, label_counts, fit_thumbnails(views, MAX_THUMBNAIL_BYTES), looks, tile)


def spread(total: int, most: int) -> list[int]:
    """All of ``0 .. total - 1``, or ``most`` of them evenly spread, first and last included."""
    return [int(value) for value in np.linspace(0, total - 1, min(total, most)).round()]


def fit_thumbnails(views: tuple[ClassView, ...], most_bytes: int) -> tuple[ClassView, ...]:
    """The views with as many thumbnails of each class as fit into so many bytes together; perhaps none."""
    keep = max((len(view.thumbnails) for view in views), default=0)
    while keep and sum(len(one.webp) for view in views for one in view.thumbnails[:keep]) > most_bytes:
        keep -= 1
    return tuple(replace(view, thumbnails=view.thumbnails[:keep]) for view in views)


class _Plan:
    """Decides, shard by shard, what to take from each, until every class has its thumbnails."""

    def __init__(self, manifest: Manifest, split: str, shown: list[int], per_class: int, tile: int) -> None:
        self.split = split
        self.missing = dict.fromkeys(shown, per_class)
        self._manifest = manifest
        self.per_class = per_class
        self._tile = tile
        samples = np.array([shard.samples for shard in manifest.splits[split]], np.int64)
        self._firsts = np.cumsum(samples) - samples
        self._looked = np.array(spread(int(samples.sum()), MAX_LOOKS))
        self._tasks: dict[int, LookTask] = {}

    def add(self, number: int, index: ShardIndex, counts: Counts, most: int) -> None:
        """Take what is needed from the shard with this number, whose classes are counted: so many of each at most."""
        task = self._tasks.get(number) or LookTask(index, {}, self._inside(number), self._manifest.classes, self._tile)
        wanted = dict(task.wanted)
        for label, missing in list(self.missing.items()):
            if count := min(missing, most, int(counts[label]) - wanted.get(label, 0)):
                wanted[label] = wanted.get(label, 0) + count
                self._found(label, count)
        self._tasks[number] = replace(task, wanted=wanted)

    def limit(self, counts: Counts) -> None:
        """Miss no more of a class than there is."""
        for label in list(self.missing):
            self._found(label, max(self.per_class - int(counts[label]), 0))

    def tasks(self) -> list[LookTask]:
        """What there is to do, in order of shards."""
        tasks = (self._tasks[number] for number in sorted(self._tasks))
        return [task for task in tasks if task.wanted or task.looked]

    def _found(self, label: int, count: int) -> None:
        self.missing[label] -= count
        if not self.missing[label]:
            del self.missing[label]

    def _inside(self, number: int) -> list[int]:
        """The positions of the samples to measure in a shard."""
        inside = self._looked - self._firsts[number]
        found: list[int] = inside[(inside >= 0) & (inside < self._manifest.splits[self.split][number].samples)].tolist()
        return found


def _read_sidecars(manifest: Manifest, plan: _Plan) -> dict[str, Counts]:
    """Count the labels of every split from the sidecars, and make the plan from those of its split.

    Images of a class are taken from many shards where that is possible, for a shard may hold one render in four flips.
    Only where too few are found so, as in shards that do not mix classes, sidecars are read again.
    """
    label_counts = {split: np.zeros(manifest.classes, np.int64) for split in manifest.splits}
    from_shard = -(-plan.per_class // len(manifest.splits[plan.split]))
    with progress("reading sidecars", sum(map(len, manifest.splits.values())), "shards") as advance:
        for split, number, shard in _scattered(manifest):
            index, counts = _read_sidecar(manifest, shard)
            label_counts[split] += counts
            if split == plan.split:
                plan.add(number, index, counts, from_shard)
            advance(1)
    plan.limit(label_counts[plan.split])
    for split, number, shard in _scattered(manifest):
        if plan.missing and split == plan.split:
            plan.add(number, *_read_sidecar(manifest, shard), plan.per_class)
    return label_counts


def _read_sidecar(manifest: Manifest, shard: Shard) -> tuple[ShardIndex, Counts]:
    path = manifest.folder / shard.name
    record = read_record(manifest.folder, shard.name, manifest.label_type)
    if record.shard() != shard or len(record.label_counts) != manifest.classes:
        raise FractalError(f"{path}: its sidecar and the manifest disagree; fetch or build it again")
    if (size := regular_size(path)) != record.bytes:
        raise FractalError(f"{path}: {size} bytes instead of {record.bytes}; fetch or build it again")
    return ShardIndex(path, np.array(record.offsets, np.int64)), np.array(record.label_counts, np.int64)


def _scattered(manifest: Manifest) -> Iterator[tuple[str, int, Shard]]:
    """All shards, those of a split in an order of which every beginning is spread evenly."""
    for split, shards in manifest.splits.items():
        for number in sorted(range(len(shards)), key=lambda number: number * _GOLDEN % 1):
            yield split, number, shards[number]


def _run(tasks: list[LookTask], workers: int) -> list[ShardLooks]:
    """What the tasks give, in their order."""
    images = sum(len(task.looked) + sum(task.wanted.values()) for task in tasks)
    with progress("looking", images, "images") as advance, worker_pool(workers) as pool:
        futures = {pool.submit(look_at_shard, task): task for task in tasks}
        for future in as_completed(futures):
            task = futures[future]
            future.result()
            advance(len(task.looked) + sum(task.wanted.values()))
    return [future.result() for future in futures]


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
    return files("fractalshards").joinpath("templates", name).read_text("utf-8")


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
