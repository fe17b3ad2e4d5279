"""Pages do not drift from the software: command lines in them parse, and every parameter of a kind is explained."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest

from fractalgen.cli import main as fractalgen
from fractalgen.kinds import KINDS
from fractalshards.cli import main as fractalshards
from fractaltrain.cli import main as fractaltrain
from fractaltrain.study import plan_study, read_study

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "shards" / "README.md"]
STUDIES = sorted(ROOT.glob("studies/*.toml"))
PROGRAMS: dict[str, click.Group] = {
    "fractalgen": fractalgen,
    "fractalshards": fractalshards,
    "fractaltrain": fractaltrain,
}


def command_lines() -> Iterator[tuple[Path, list[str]]]:
    """What stands on a line of its own in a block of code, and in `...` if it does not just name an option."""
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text())
        lines = re.findall(r"^(?: {4}|\$ )?((?:fractalgen|fractalshards|fractaltrain) \w+ .*)$", text, re.MULTILINE)
        prose = re.findall(r"`((?:fractalgen|fractalshards|fractaltrain) \w+ [^`]+)`", text.replace("\n", " "))
        for line in lines + [line for line in prose if not re.search(r"--[a-z-]+$", line)]:
            code = line.rstrip(" &'").partition(" > ")[0]
            if "`" not in code and "..." not in code:
                yield page, shlex.split(code, comments=True)


LINES = [pytest.param(line, id=f"{page.name}: {shlex.join(line)}") for page, line in command_lines()]


def test_there_are_many() -> None:
    assert len(LINES) > 60


@pytest.mark.parametrize("line", LINES)
def test_a_command_line_parses(line: list[str]) -> None:
    program, name, *arguments = line
    command = PROGRAMS[program].commands[name]
    context = click.Context(command, info_name=name)
    given, rest, _ = command.make_parser(context).parse_args(arguments)
    assert not rest
    chosen = [option for option in command.params if isinstance(option.type, click.Choice) and option.name in given]
    for option in chosen:
        option.type.convert(given[option.name], option, context)


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.name)
def test_studies_can_be_read_and_their_datasets_be_made(file: Path) -> None:
    study = read_study(file)
    for run in plan_study(study).finetunings:
        test_a_command_line_parses(["fractaltrain", *run.command(Path("runs"), Path("data"))])
    commands = {row.shards: shlex.split(row.build) for row in study.pretraining.values() if row.build}
    assert {*commands} == {row.shards for row in study.pretraining.values()}
    for shards, words in commands.items():
        test_a_command_line_parses(words)
        default = [f"shards/{words[words.index('--kind') + 1]}"] if "--out" not in words and "--kind" in words else []
        assert shards in words + default


def test_the_example_of_a_study_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "studies.md").read_text(), re.DOTALL)
    (tmp_path / "example.toml").write_text(example)
    test_studies_can_be_read_and_their_datasets_be_made(tmp_path / "example.toml")


def test_every_parameter_of_every_kind_is_explained() -> None:
    page = (ROOT / "docs" / "kinds.md").read_text()
    for kind in KINDS.values():
        assert f"## {kind.name}\n" in page
        for field in fields(kind.params):
            assert f"`{field.name}`" in page, f"{kind.name}: {field.name}"


def test_pictures_are_small_and_used() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 300_000, picture
        assert f"images/{picture.name}" in pages


def test_links_of_readme_and_contributing() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{page}: {target}"
