"""The page of ``fractalshards report`` as a browser shows it."""

import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fractalshards.manifest import INFO
from fractalshards.sample import MultiLabel, Object
from fractalshards.storage import write_json
from painted_dataset import HOSTILE_NAME, HOSTILE_VALUE, NAMES, plain, report, write_dataset

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
