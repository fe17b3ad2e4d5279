"""``fractalshards report``: what the survey counts and shows, and the page as a browser shows it."""

import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from fractalshards.atomic import write_json
from fractalshards.cli import main
from fractalshards.digest import mapping_digest
from fractalshards.errors import FractalError
from fractalshards.labels import Label, MultiLabel, Object
from fractalshards.manifest import load_manifest, read_record, write_manifest
from fractalshards.names import INFO, sample_key, shard_name, sidecar_name
from fractalshards.png import Pixels
from fractalshards.report.charts import class_chart, histogram, tally
from fractalshards.report.looks import Thumbnail, measure
from fractalshards.report.survey import ClassView, Survey, fit_thumbnails, survey_dataset
from fractalshards.writer import write_shard

HOSTILE_NAME = "<script>window.hacked = 1</script>\"'><img src=x onerror='window.hacked = 2'>"
HOSTILE_VALUE = "</style></script><script>window.hacked = 3</script>{{ 7 * 7 }}"
NAMES = ("goldfish", HOSTILE_NAME, *(f"thing {index}" for index in range(2, 30)))


def color(label: int) -> tuple[int, int, int]:
    """A colour that tells the class of an image, and survives lossy compression."""
    return 40 * (label % 6) + 20, 40 * (label // 6 % 6) + 20, 128


def plain(label: int, side: int = 16) -> Pixels:
    return np.full((side, side, 3), color(label), np.uint8)


def write_dataset(
    folder: Path,
    shards: Sequence[Sequence[tuple[Pixels, Label]]],
    classes: int,
    recipe: dict[str, object] | None = None,
    **more: Any,
) -> Path:
    """A dataset with these images and labels; enough of one to be reported."""
    folder.mkdir()
    records = []
    keys = map(sample_key, range(10**9))
    for number, samples in enumerate(shards):
        keyed = [(next(keys), sample) for sample in samples]
        records.append(write_shard(folder, shard_name("train", number), classes, keyed).shard())
    recipe = recipe or {"kind": "test", "systems_digest": "0" * 32}
    multi = any(isinstance(label, MultiLabel) for samples in shards for _, label in samples)
    write_manifest(
        folder,
        {"train": records},
        recipe=recipe,
        recipe_digest=mapping_digest(recipe),
        label_type="multi" if multi else "single",
        classes=classes,
        image_size=None,
        **more,
    )
    return folder


def survey(folder: Path) -> Survey:
    return survey_dataset(load_manifest(folder), workers=1)


def report(folder: Path, out: Path) -> Result:
    return CliRunner().invoke(main, ["report", str(folder), "--out", str(out), "--workers", "1"])


def color_of(thumbnail: Thumbnail) -> tuple[float, ...]:
    with Image.open(BytesIO(thumbnail.webp)) as image:
        return tuple(np.asarray(image.convert("RGB"), np.float64).mean(axis=(0, 1)))


# ---- survey


def test_label_counts_are_exact_and_thumbnails_show_their_class(tmp_path: Path) -> None:
    labels = [0] * 5 + [1] * 20 + [2] * 3
    samples = [(plain(label), label) for label in labels]
    seen = survey(write_dataset(tmp_path / "data", [samples[:13], samples[13:]], classes=4))
    assert seen.label_counts["train"].tolist() == [5, 20, 3, 0]
    assert [view.count for view in seen.views] == [5, 20, 3, 0]
    assert [len(view.thumbnails) for view in seen.views] == [5, 8, 3, 0]
    for view in seen.views:
        assert len({one.key for one in view.thumbnails}) == len(view.thumbnails)
        for thumbnail in view.thumbnails:
            assert labels[int(thumbnail.key)] == view.index
            assert np.allclose(color_of(thumbnail), color(view.index), atol=6)
    assert len(seen.looks) == len(labels)


def test_shards_that_do_not_mix_classes_give_as_many_thumbnails(tmp_path: Path) -> None:
    shards = [[(plain(label), label)] * 10 for label in range(12)]
    seen = survey(write_dataset(tmp_path / "data", shards, classes=12))
    assert [len(view.thumbnails) for view in seen.views] == [8] * 12


def test_thumbnails_come_from_many_shards(tmp_path: Path) -> None:
    shards = [[(plain(0), 0)] * 10 for _ in range(8)]
    (view,) = survey(write_dataset(tmp_path / "data", shards, classes=1)).views
    assert {int(one.key) // 10 for one in view.thumbnails} == set(range(8))


def test_measures_are_bounded_and_evenly_spread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fractalshards.report.survey.MAX_LOOKS", 10)
    shards = [[(plain(0, 16 + number), 0)] * 20 for number in range(5)]
    seen = survey(write_dataset(tmp_path / "data", shards, classes=1))
    assert sorted(look.width for look in seen.looks) == [16, 16, 17, 17, 18, 18, 19, 19, 20, 20]


def test_a_multi_label_image_stands_under_each_of_its_classes_with_its_boxes(tmp_path: Path) -> None:
    label = MultiLabel.of((Object(2, (1, 2, 3, 4)), Object(0, (10, 10, 99, 99))))
    seen = survey(write_dataset(tmp_path / "data", [[(plain(0), label)]], classes=3))
    assert [len(view.thumbnails) for view in seen.views] == [1, 0, 1]
    assert seen.views[2].thumbnails[0].objects == (Object(2, (1, 2, 3, 4)), Object(0, (10, 10, 6, 6)))
    assert seen.looks[0].objects == 2


def test_measures() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4, :4] = 1, 0, 0
    assert measure(image, 0, 100).fill == 0.25
    assert measure(image, 0, 100).detail == 0
    image[:4, :4] = 0, 33, 0
    assert measure(image, 0, 100).detail == (8 + 7) / 64  # both sides of an edge of 4 + 4 pixels, the corner once
    label = MultiLabel.of((Object(1, (0, 0, 4, 8)), Object(1, (2, 0, 4, 4))))
    assert measure(image, label, 100).covered == (32 + 8) / 64
    assert (measure(image, label, 100).objects, measure(image, 0, 100).bytes) == (2, 100)


def test_thumbnails_fit_into_a_bound() -> None:
    thumbnail = Thumbnail("0", 1, 1, bytes(100), ())
    views = tuple(ClassView(label, 9, (thumbnail,) * 4) for label in range(10))
    assert [len(view.thumbnails) for view in fit_thumbnails(views, 4000)] == [4] * 10
    assert [len(view.thumbnails) for view in fit_thumbnails(views, 3999)] == [3] * 10
    assert [len(view.thumbnails) for view in fit_thumbnails(views, 10)] == [0] * 10


def test_charts() -> None:
    chart = class_chart("", np.array([2, 4, 0]))
    assert [bar.height for bar in chart.bars] == [50, 100, 0]
    assert chart.note == "From 0 to 4 images per class, median 2. 1 class without any."
    assert class_chart("", np.array([3, 3])).note == "Every class has 3 images."
    many = class_chart("", np.arange(1500))
    assert len(many.bars) == 250
    assert many.bars[1].tip == "classes 6 to 11: 8.5 images"
    assert sum(bar.height > 0 for bar in histogram("", "", [0.1, 0.1, 0.9], (0, 1), str).bars) == 2
    assert [bar.tip for bar in tally("", [1, 1, 99]).bars[:2]] == ["0: 0 images", "1: 2 images"]
    assert tally("", [1, 1, 99]).ticks[-1] == "15 or more"


# ---- command


def test_errors_are_one_line(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = report(dataset, tmp_path / "page.txt")
    assert (wrong.exit_code, wrong.stderr) == (
        2,
        f"error: --out is {tmp_path / 'page.txt'}: expected a name that ends in .html\n",
    )
    missing = report(tmp_path / "nowhere", tmp_path / "page.html")
    assert (missing.exit_code, missing.stderr.count("\n")) == (1, 1)
    record = read_record(dataset, "train-000000.tar", "single")
    with (dataset / "train-000000.tar").open("r+b") as file:
        os.pwrite(file.fileno(), bytes(400), record.offsets[1] + 512 + 20)
    damaged = report(dataset, tmp_path / "page.html")
    assert damaged.exit_code == 1
    assert "train-000000.tar: sample 1: image cannot be decoded" in damaged.stderr.splitlines()[-1]
    os.truncate(dataset / "train-000000.tar", 3000)
    assert "train-000000.tar: 3000 bytes instead of" in report(dataset, tmp_path / "page.html").stderr
    monkeypatch.setitem(sys.modules, "jinja2", None)
    without = report(dataset, tmp_path / "page.html")
    assert without.exit_code == 1
    assert without.stderr == (
        "error: a report needs jinja2, which is not installed; run pip install '.[report]' in a clone of the project\n"
    )
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("name", ["label_counts", "bytes"])
def test_a_sidecar_of_another_dataset_is_refused(dataset: Path, name: str) -> None:
    path = dataset / sidecar_name("train-000001.tar")
    record = json.loads(path.read_text())
    write_json(path, {**record, name: [*record[name], 0] if name == "label_counts" else 10**15})
    with pytest.raises(FractalError, match=r"train-000001.tar: its sidecar and the manifest disagree"):
        survey(dataset)


def test_a_dataset_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FractalError, match="no image in it"):
        survey(write_dataset(tmp_path / "data", [], classes=2))


def test_the_page_of_many_classes_is_bounded(tmp_path: Path) -> None:
    names = ["<&\"'>" * 60] * 20_000
    folder = write_dataset(tmp_path / "data", [[(plain(0), 0)]], classes=20_000, class_names=names, class_ids=names)
    assert report(folder, tmp_path / "page.html").exit_code == 0
    assert (tmp_path / "page.html").stat().st_size < 6_000_000  # and 6.7 MB of thumbnails at most
    assert "4,000 of 20,000 classes, evenly spread" in (tmp_path / "page.html").read_text()


def test_a_dataset_that_was_not_rendered_offers_no_recipe(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", [[(plain(0), 0)]], classes=1, recipe={"kind": "packed"})
    assert report(folder, tmp_path / "page.html").exit_code == 0
    page = (tmp_path / "page.html").read_text()
    assert f"fractalshards push {folder} URL" in page
    assert "fractalshards recipe" not in page


# ---- browser


# Chromium reads commands from descriptor 3 and answers on 4
START = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """A page in Chromium, driven through its DevTools protocol over a pair of pipes."""

    def __init__(self, send: int, receive: int) -> None:
        self._send = send
        self._receive = receive
        self._pending = b""
        self._number = 0
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        self.call("Browser.grantPermissions", permissions=["clipboardReadWrite"])
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.bringToFront")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while (answer := self._receive_message()).get("id") != message["id"]:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, url: str) -> None:
        self.call("Page.navigate", url="about:blank")
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.run("document.readyState === 'complete' || new Promise((done) => addEventListener('load', done))")
        self.run("Promise.all(Array.from(document.images, (image) => image.decode())).then(() => 0)")

    def run(self, script: str) -> Any:
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def type(self, selector: str, text: str) -> None:
        self.run(f"document.querySelector({json.dumps(selector)}).focus(), document.activeElement.select()")
        self.call("Input.insertText", text=text)

    def complaints(self) -> list[dict[str, Any]]:
        """What the console says: errors of scripts, of the policy, of loading; messages of any kind."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """URLs that were asked for, but those that hold their content."""
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [url for event in sent if not (url := event["params"]["request"]["url"]).startswith("data:")]

    def _receive_message(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            assert select.select([self._receive], [], [], 60)[0], "Chromium does not answer"
            data = os.read(self._receive, 1 << 20)
            assert data, "Chromium has ended"
            self._pending += data
        first, _, self._pending = self._pending.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        if "method" in message:
            self.events.append(message)
        return message


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs chromium, chromium-browser or google-chrome")
    (commands_out, commands_in), (answers_out, answers_in) = os.pipe(), os.pipe()
    profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
    options = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--remote-debugging-pipe",
        profile,
    )
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(commands_out), str(answers_in), program, *options],
        pass_fds=(commands_out, answers_in),
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_out)
    os.close(answers_in)
    yield Browser(commands_in, answers_out)
    process.terminate()
    process.wait(30)
    os.close(commands_in)
    os.close(answers_out)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of the report of a dataset with 30 classes, hostile names and a hostile recipe."""
    folder = tmp_path_factory.mktemp("<b>report") / "d'<i>ata"
    samples = [(plain(label), label) for label in range(30) for _ in range(3)]
    recipe = {
        "kind": HOSTILE_VALUE,
        HOSTILE_VALUE: HOSTILE_VALUE,
        "systems_digest": HOSTILE_VALUE,
        "params": {"x": [HOSTILE_VALUE]},
    }
    write_dataset(folder, [samples], 30, recipe, class_names=NAMES, class_ids=[f"n{index:08d}" for index in range(30)])
    info = json.loads((folder / INFO).read_text())
    write_json(folder / INFO, {**info, "software": {HOSTILE_VALUE: HOSTILE_VALUE}})
    out = folder.parent / "report.html"
    result = report(folder, out)
    assert result.exit_code == 0, result.output
    return out.as_uri()


@pytest.fixture
def opened(browser: Browser, page: str) -> Browser:
    browser.open(page)
    return browser


def visible(browser: Browser) -> list[int]:
    """The classes one can see."""
    script = (
        "Array.from(document.querySelectorAll('.class')).filter((e) => e.offsetHeight).map((e) => +e.dataset.class)"
    )
    classes: list[int] = browser.run(script)
    return classes


def test_the_page_shows_every_image_without_complaint_or_request(opened: Browser, page: str) -> None:
    opened.run("document.getElementById('more').click()")
    sizes = opened.run("Array.from(document.images, (image) => [image.naturalWidth, image.offsetWidth])")
    assert len(sizes) == 30 * 3
    assert all(natural == 16 and shown >= 60 for natural, shown in sizes)
    assert opened.complaints() == []
    assert opened.requests() == [page]


def test_hostile_text_is_shown_and_does_nothing(opened: Browser) -> None:
    assert opened.run("window.hacked === undefined")
    assert opened.run("document.scripts.length") == 1
    name = opened.run("document.querySelector('.class[data-class=\"1\"] .name').textContent")
    assert name == HOSTILE_NAME[:59] + "…"
    assert HOSTILE_VALUE in opened.run("document.getElementById('recipe').textContent")
    assert opened.run("document.querySelector('h1').textContent") == "d'<i>ata"
    assert "push '" in opened.run("document.getElementById('share').textContent")


def test_the_policy_stops_what_is_not_the_pages_own(opened: Browser) -> None:
    opened.run(
        "const made = document.createElement('script'); made.textContent = 'window.hacked = 4';"
        "document.body.append(made);"
        "new Promise((done) => {const image = new Image(); image.onerror = () => done(); image.src = 'http://127.0.0.1:1'})"
    )
    assert opened.run("window.hacked === undefined")
    failed = [event["params"] for event in opened.events if event["method"] == "Network.loadingFailed"]
    assert [event.get("blockedReason") for event in failed] == ["csp"]


def test_the_filter_finds_classes_by_index_range_name_and_identifier(opened: Browser) -> None:
    assert visible(opened) == list(range(24))
    found = {
        "7": [7],
        "2 - 4, 29": [2, 3, 4, 29],
        "GOLD": [0],
        "n00000012": [12],
        "<script>": [1],
        "nothing like it": [],
        "thing 2": [2, *range(20, 30)],
    }
    for query, classes in found.items():
        opened.type("#filter", query)
        assert visible(opened) == classes, query
    assert opened.run("document.getElementById('status').textContent") == "11 of 30 classes"
    assert opened.run("location.hash") == "#class=thing%202"
    opened.run("filter.value = '', filter.dispatchEvent(new Event('input'))")
    assert visible(opened) == list(range(24))
    opened.run("document.getElementById('more').click()")
    assert visible(opened) == list(range(30))
    assert opened.run("document.activeElement.dataset.class") == "24"


def test_an_address_can_name_a_class(browser: Browser, page: str) -> None:
    browser.open(f"{page}#class=7,9")
    assert visible(browser) == [7, 9]
    assert browser.run("document.getElementById('filter').value") == "7,9"
    browser.run("location.hash = '#class=gold%66ish'")
    browser.run("new Promise((done) => setTimeout(done))")
    assert visible(browser) == [0]


def test_a_button_copies_its_command(opened: Browser) -> None:
    center = "const box = button.getBoundingClientRect(); [box.x + box.width / 2, box.y + box.height / 2]"
    x, y = opened.run(
        "const button = document.querySelectorAll('#share .copy')[2];"
        f"button.scrollIntoView({{block: 'center', behavior: 'instant'}}); {center}"
    )
    for kind in ("mousePressed", "mouseReleased"):
        opened.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    opened.run(
        "new Promise((done) => {const poll = () => button.textContent === 'Copy'"
        " ? requestAnimationFrame(poll) : done(); poll()})"
    )
    assert opened.run("button.textContent") == "Copied"
    assert opened.run("navigator.clipboard.readText()") == """fractalshards pull URL 'd'"'"'<i>ata'"""


def test_a_phone_needs_no_scrolling_sideways(opened: Browser) -> None:
    opened.call("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    widths = opened.run("[document.documentElement.scrollWidth, window.innerWidth]")
    opened.call("Emulation.clearDeviceMetricsOverride")
    assert widths == [360, 360]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(opened: Browser, scheme: str) -> None:
    opened.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    for selector, ground in (
        ("body", "body"),
        (".note", "body"),
        (".count", ".class"),
        ("nav a", "body"),
        ("th", "body"),
    ):
        style = "getComputedStyle(document.querySelector('{}')).{}"
        text, paper = (opened.run(style.format(*one)) for one in ((selector, "color"), (ground, "backgroundColor")))
        assert contrast(text, paper) >= 4.5, (selector, text, paper)


def contrast(first: str, second: str) -> float:
    """The contrast ratio of WCAG between two colours written as ``rgb(r, g, b)``."""
    light = []
    for css in (first, second):
        values = np.array([int(part) for part in css[4:-1].split(",")]) / 255
        linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
        light.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_boxes_lie_over_the_images_and_can_be_switched_off(browser: Browser, tmp_path: Path) -> None:
    label = MultiLabel.of((Object(1, (8, 4, 8, 8)), Object(0, (0, 0, 4, 4))))
    folder = write_dataset(tmp_path / "data", [[(plain(0), label)] * 3], classes=2)
    assert report(folder, tmp_path / "page.html").exit_code == 0
    browser.open((tmp_path / "page.html").as_uri())
    box, image = browser.run(
        "['rect.own', 'img'].map((name) => document.querySelector(`.class[data-class='1'] ${name}`))"
        ".map((element) => element.getBoundingClientRect()).map((box) => [box.x, box.y, box.width, box.height])"
    )
    side = image[2]
    assert np.allclose(box, [image[0] + side / 2, image[1] + side / 4, side / 2, side / 2], atol=2)
    opacity = "getComputedStyle(document.querySelector('rect.own')).opacity"
    assert browser.run(opacity) == "1"
    browser.run("document.getElementById('boxes').click()")
    assert browser.run(opacity) == "0"
    assert browser.complaints() == []
