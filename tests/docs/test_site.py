"""The documentation builds without a warning, holds what it takes from elsewhere, fetches nothing when looked at."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; strict: a broken link or anchor, or a page that is in no menu, is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=environment, timeout=200)
    assert result.returncode == 0, result.stderr
    return folder


class Loaded(HTMLParser):
    """What a browser loads with a page."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("script", "img", "iframe"):
            self.urls += [values["src"] or ""] if "src" in values else []
        elif tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.urls.append(values["href"] or "")


def test_looking_at_a_page_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        for url in Loaded(page).urls:
            assert not re.match(r"(\w+:)?//", url), f"{page}: {url}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(\s*[\"']?(https?:)?//", style.read_text()), style


def test_pages_hold_what_they_take_from_elsewhere(site: Path) -> None:
    for page, words in {
        "formats": "The shard format, version 1",
        "contributing": "Cut a release",
        "changelog": "Keep a Changelog",
        "commands": "fractaltrain pt --shards shards/single --model resnet50",
        "api": "Render sample",
        "add-a-kind": "GlowParams",
        "paper": "deit_small_patch32_224",
    }.items():
        text = re.sub(r"<[^>]*>", "", (site / f"{page}.html").read_text())
        assert words in text, page


def test_pictures_are_small_and_used() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for picture in IMAGES.iterdir():
        assert picture.stat().st_size < 300_000, picture
        assert f"images/{picture.name}" in pages


def test_the_readme_and_contributing_link_to_what_is_there() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{page}: {target}"
