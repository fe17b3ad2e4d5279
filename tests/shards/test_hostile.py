"""Broken and hostile datasets: every command says what is wrong in one line, and nothing else happens.

The table of ``damages``, of which some are tried on the other commands too. Bounds on numbers are lowered where
reaching them takes long: ``test_hostile_memory`` reaches them.
"""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from damages import IMAGES, MANIFESTS, MARK, OTHERS, SHARDS, SIDECARS, Case, in_manifest
from fractalshards import diff as compare
from fractalshards import fields, verify
from fractalshards import png as png_module
from fractalshards import report as survey
from fractalshards.cli import main
from fractalshards.manifest import INFO

PROGRESS = ("verifying: ", "indexing: ", "comparing: ", "reading sidecars: ", "looking: ")


@contextmanager
def in_this_process(workers: int) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(workers) as pool:
        yield pool


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads instead of processes, and bounds that are reached soon."""
    for module in (verify, compare, survey):
        monkeypatch.setattr(module, "worker_pool", in_this_process)
    monkeypatch.setattr(fields, "_MAX_VALUES", 1000)
    monkeypatch.setattr(png_module, "_MAX_CHUNKS", 1000)


def check_failure(result: Result, folder: Path) -> str:
    """The error, after checking that it is one line, not too long, and all there is on stderr beside progress."""
    assert isinstance(result.exception, SystemExit), result.exc_info
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith(PROGRESS)]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"error: {folder}"), lines
    assert len(lines[0]) < 2100
    return lines[0]


@pytest.mark.parametrize("case", MANIFESTS + SIDECARS + SHARDS + IMAGES + OTHERS, ids=lambda case: case.name)
def test_hostile(case: Case, dataset: Path, tmp_path: Path) -> None:
    case.damage(dataset)
    before = {path.name for folder in (dataset, tmp_path) for path in folder.iterdir()}
    for command, *options in (("info",), ("sheet", "--out", str(tmp_path / "sheet.png")), ("verify", "--workers", "1")):
        result = CliRunner().invoke(main, [command, str(dataset), *options])
        if command not in case.failing:
            assert result.exit_code == 0, result.output
            continue
        error = check_failure(result, dataset)
        if command == "verify" and "info" not in case.failing:
            bad = [line for line in result.stdout.splitlines() if case.words in line]
            assert bad, result.stdout
            assert all(line.startswith("bad: ") and line.count(str(dataset)) == 1 for line in bad)
        else:
            assert case.words in error
    after = {path.name for folder in (dataset, tmp_path) for path in folder.iterdir()}
    assert after - before == (set() if "sheet" in case.failing else {"sheet.png"})
    result = CliRunner().invoke(main, ["index", "--dali", str(dataset)])
    if result.exit_code or "info" in case.failing:
        check_failure(result, dataset)
    assert not MARK.exists()


NOT_DIFF = ("program for systems", "pipe for systems")  # which only the recipe is made of
OTHERWISE = (
    *("name with a pipe", "lists for a count", "recipe 500 deep", "device for the manifest"),
    *("offsets beyond the file", "a sample of 100 MB", "pipe for a sidecar", "pipe for a shard", "cut off"),
    *("link", "10 GB claimed", "two samples in one", "label out of range", "file too many"),
    *("100 million pixels", "truncated image", "2000 chunks", *NOT_DIFF),
)


@pytest.mark.parametrize("name", OTHERWISE)
def test_hostile_to_other_commands(name: str, dataset: Path, tmp_path: Path) -> None:
    (case,) = (case for case in MANIFESTS + SIDECARS + SHARDS + IMAGES + OTHERS if case.name == name)
    other = shutil.copytree(dataset, tmp_path / "other")
    digests = json.loads((other / INFO).read_text())["splits"]["train"]["content_digests"]
    in_manifest(content_digests=[digests[0], "0" * 32])(other)  # so the samples of this shard are compared
    case.damage(dataset)
    reading = ("diff", "report") if name not in NOT_DIFF else ()
    failing = {*reading, "recipe"} if "info" in case.failing or not reading else set(reading)
    for command, *options in (
        ("diff", str(other), "--workers", "1"),
        ("report", "--out", str(tmp_path / "page.html"), "--workers", "1"),
        ("recipe", "--out", str(tmp_path / "recipe.json")),
    ):
        result = CliRunner().invoke(main, [command, str(dataset), *options])
        if command in failing:
            assert case.words.rpartition(": ")[2] in check_failure(result, dataset)
        else:
            assert "error" not in result.stderr
    written = {"page.html", "recipe.json"} & {path.name for path in tmp_path.iterdir()}
    assert written == {name for name, by in (("page.html", "report"), ("recipe.json", "recipe")) if by not in failing}
    assert not MARK.exists()
