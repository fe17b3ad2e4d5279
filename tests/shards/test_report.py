"""``fractalshards report``: what the survey counts and shows, what the page holds, and that hostile text stays text."""

import base64
import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from io import BytesIO
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from damages import SHARD, SIDECAR, edit, in_file, overwrite
from fractalshards.manifest import INFO, DatasetInfo, load_manifest, read_record, sample_key
from fractalshards.png import Pixels
from fractalshards.report import class_chart, histogram, tally
from fractalshards.sample import Label, MultiLabel, Object
from fractalshards.survey import Survey, Thumbnail, fit_thumbnails, survey_dataset
from packing import assert_refused, good, run, write_dataset

pytestmark = pytest.mark.usefixtures("threads")
HOSTILE = "</style></script><script>x=1</script>{{ 7 * 7 }}\"'><img src=x onerror='x=2'>"


def color(label: int) -> tuple[int, int, int]:
    """A colour that shows the class and survives lossy compression."""
    return 40 * (label % 6) + 20, 40 * (label // 6 % 6) + 20, 128


def plain(label: int, side: int = 16) -> Pixels:
    return np.full((side, side, 3), color(label), np.uint8)


def write(folder: Path, shards: Sequence[Sequence[tuple[Pixels, Label]]], classes: int, **more: Any) -> Path:
    keys = map(sample_key, count())
    train = [[(next(keys), sample) for sample in samples] for samples in shards]
    multi = any(isinstance(label, MultiLabel) for samples in shards for _, label in samples)
    recipe = {"kind": "test", "systems_digest": "0" * 32}
    facts = {"label_type": "multi" if multi else "single", "classes": classes, "recipe": recipe, **more}
    return write_dataset(folder, {"train": train}, DatasetInfo(**facts))


def survey(folder: Path) -> Survey:
    return survey_dataset(load_manifest(folder), workers=2)


def report(folder: Path, out: Path) -> Result:
    return run("report", folder, "--out", out, "--workers", 1)


def page(folder: Path) -> str:
    good("report", folder, "--out", folder.parent / "page.html", "--workers", 1)
    return (folder.parent / "page.html").read_text()


def test_survey_counts_are_exact_and_thumbnails_show_their_class(tmp_path):
    labels = [0] * 5 + [1] * 20 + [2] * 3
    samples = [(plain(label), label) for label in labels]
    seen = survey(write(tmp_path / "data", [samples[:13], samples[13:]], classes=4))
    assert seen.counts["train"].tolist() == [5, 20, 3, 0]
    assert [len({one.key for one in found}) for found in seen.thumbnails.values()] == [5, 8, 3, 0]
    for label, found in seen.thumbnails.items():
        for thumbnail in found:
            assert labels[int(thumbnail.key)] == label
            with Image.open(BytesIO(thumbnail.webp)) as image:
                assert np.allclose(np.asarray(image.convert("RGB")).mean(axis=(0, 1)), color(label), atol=6)


def test_survey_thumbnails_come_from_many_shards(tmp_path):
    mixed = survey(write(tmp_path / "mixed", [[(plain(0), 0)] * 10 for _ in range(8)], classes=1))
    assert {int(one.key) // 10 for one in mixed.thumbnails[0]} == set(range(8))
    unmixed = write(tmp_path / "unmixed", [[(plain(label), label)] * 10 for label in range(12)], classes=12)
    assert [len(found) for found in survey(unmixed).thumbnails.values()] == [8] * 12


def test_survey_statistics_are_bounded_and_evenly_spread(tmp_path, monkeypatch):
    monkeypatch.setattr("fractalshards.survey.MAX_MEASURED", 10)
    shards = [[(plain(0, 16 + number), 0)] * 20 for number in range(5)]
    stats = survey(write(tmp_path / "data", shards, classes=1)).stats
    assert sorted(one.width for one in stats) == [16, 16, 17, 17, 18, 18, 19, 19, 20, 20]


def test_survey_of_several_labels_shows_an_image_under_each_class(tmp_path):
    label = MultiLabel.of((Object(2, (1, 2, 3, 4)), Object(0, (10, 10, 6, 6))))
    seen = survey(write(tmp_path / "data", [[(plain(0), label)]], classes=3))
    assert [len(found) for found in seen.thumbnails.values()] == [1, 0, 1]
    assert seen.thumbnails[2][0].objects == label.objects
    assert seen.stats[0][:2] == (16, 16)
    assert seen.stats[0][3:] == (1.0, 2)


def test_thumbnails_fit_a_size():
    thumbnails = {label: [Thumbnail("0", 1, 1, bytes(100), ())] * 4 for label in range(10)}
    for most, most_each in ((4000, 4), (3999, 3), (10, 0)):
        assert {len(found) for found in fit_thumbnails(thumbnails, most).values()} == {most_each}


def test_charts():
    chart = class_chart("", np.array([2, 4, 0]))
    assert chart.values == [2, 4, 0]
    assert chart.note == "0 to 4 images per class, median 2. 1 without images."
    many = class_chart("", np.arange(1500))
    assert len(many.values) == 250
    assert (many.names[1], many.values[1]) == ("classes 6 to 11", 8.5)
    assert sorted(histogram("", "", [0.1, 0.1, 0.9], str).values)[-3:] == [0, 1, 2]
    assert tally("", [1, 1, 99]).values[:2] == [0, 2]
    assert tally("", [1, 1, 99]).ticks[-1] == "15 or more"


class Parser(HTMLParser):
    """Counts the tags of a page and collects its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: dict[str, list[dict[str, str | None]]] = {}
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.setdefault(tag, []).append(dict(attrs))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_holds_all_classes_and_escapes_hostile_text(tmp_path):
    recipe = {"kind": HOSTILE, HOSTILE: HOSTILE, "systems_digest": HOSTILE, "params": {"x": [HOSTILE]}}
    names = ["goldfish", HOSTILE, *(f"thing {index}" for index in range(2, 30))]
    samples = [(plain(label), label) for label in range(30) for _ in range(3)]
    folder = tmp_path / "<b>report" / "d'<i>ata"
    write(folder, [samples], 30, recipe=recipe, class_names=names, class_ids=names)
    edit(folder / INFO, software={HOSTILE: HOSTILE})
    html = page(folder)
    parsed = Parser(html)
    assert [one["data-class"] for one in parsed.tags["article"]] == [str(label) for label in range(30)]
    assert len(parsed.tags["img"]) == 30 * 3
    assert all(str(one["src"]).startswith("data:image/webp;base64,") for one in parsed.tags["img"])
    assert (len(parsed.tags["script"]), len(parsed.tags["style"])) == (1, 1)
    assert not [name for found in parsed.tags.values() for one in found for name in one if name.startswith("on")]
    assert not parsed.tags.keys() & {"i", "iframe", "form", "object", "base"}
    assert "{{ 7 * 7 }}" in parsed.text  # the template does not run it
    assert f"fractalshards push '{tmp_path}/<b>report/d'\"'\"'<i>ata' URL" in parsed.text
    policy = next(str(one["content"]) for one in parsed.tags["meta"] if "http-equiv" in one)
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy


def test_page_of_many_classes_is_bounded(tmp_path):
    names = ["<&\"'>" * 60] * 20_000
    html = page(write(tmp_path / "data", [[(plain(0), 0)]], 20_000, class_names=names, class_ids=names))
    assert len(html) < 6_000_000  # and 6.7 MB of thumbnails at most
    assert "4,000 of 20,000 classes" in html


def test_page_offers_a_recipe_for_rendered_datasets_only(tmp_path):
    samples = [[(plain(0), 0)]]
    assert "fractalshards recipe" in page(write(tmp_path / "rendered", samples, 1))
    assert "fractalshards recipe" not in page(write(tmp_path / "packed", samples, 1, recipe={"kind": "packed"}))


@pytest.mark.slow
def test_page_filter_in_a_browser(tmp_path):
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs chromium, chromium-browser or google-chrome")
    names = ["goldfish", *(f"thing {index}" for index in range(1, 30))]
    page(write(tmp_path / "data", [[(plain(label), label) for label in range(30)]], 30, class_names=names))
    url = (tmp_path / "page.html").as_uri()
    for query, classes in ("", list(range(30))), ("2 - 4, GOLD", [0, 2, 3, 4]), ("thing 2", [2, *range(20, 30)]):
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        command = [program, *options, "--dump-dom", f"{url}?class={query}"]
        html = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        cards = Parser(html).tags["article"]
        assert [int(str(one["data-class"])) for one in cards if "hidden" not in one] == classes, query


def test_report_refuses_damaged_datasets_and_bad_places(tmp_path, dataset):
    out = tmp_path / "page.html"
    assert_refused(report(dataset, Path("/proc/new/page.html")), 1, "/proc/new")
    assert_refused(report(dataset, tmp_path / "page.txt"), 2, "--out")
    assert_refused(report(write(tmp_path / "empty", [], classes=2), out), 1, "empty")
    record = read_record(dataset, SHARD, "single")
    in_file(SIDECAR, label_counts=[*record.label_counts, 0])(dataset)
    assert_refused(report(dataset, out), 1, SHARD)
    in_file(SIDECAR, label_counts=record.label_counts)(dataset)
    overwrite(dataset / SHARD, record.offsets[1] + 512 + 20, bytes(400))
    assert_refused(report(dataset, out), 1, f"{SHARD}: 000000006: ")
    assert not out.exists()
