"""Help and pages match the software: command lines parse, studies are valid, the example of add-a-kind.md works."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

from fractalgen.cli import main as fractalgen
from fractalgen.kinds import KINDS, Kind
from fractalshards.cli import main as fractalshards
from fractalshards.console import Command
from fractalshards.manifest import load_manifest
from fractalshards.verify import verify_dataset
from fractaltrain.cli import main as fractaltrain
from fractaltrain.study import plan_study, read_study

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "shards" / "README.md"]
PROGRAMS = {"fractalgen": fractalgen, "fractalshards": fractalshards, "fractaltrain": fractaltrain}


def command_lines() -> Iterator[tuple[Path, list[str]]]:
    """Yield lines of code blocks, and inline code that does not end with the mere name of an option."""
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text()).replace("--kind glow", "--kind single")  # of add-a-kind.md
        lines = re.findall(r"^(?: {4}|\$ )?((?:fractalgen|fractalshards|fractaltrain) \w+ .*)$", text, re.MULTILINE)
        prose = re.findall(r"`((?:fractalgen|fractalshards|fractaltrain) \w+ [^`]+)`", text.replace("\n", " "))
        for line in lines + [line for line in prose if not re.search(r"--[a-z-]+$", line)]:
            code = line.rstrip(" &'").partition(" > ")[0]
            if "`" not in code and "..." not in code:
                yield page, shlex.split(code, comments=True)


LINES = [pytest.param(line, id=f"{page.name}: {shlex.join(line)}") for page, line in command_lines()]
assert len(LINES) > 40


def contexts() -> Iterator[click.Context]:
    """Yield the programs and their commands, with the help of a terminal of 80 columns."""
    for name, program in PROGRAMS.items():
        parent = click.Context(program, info_name=name, terminal_width=80, **program.context_settings)
        yield parent
        for command_name, command in program.commands.items():
            yield click.Context(command, parent, info_name=command_name, terminal_width=80)


ALL = list(contexts())
EVERY = pytest.mark.parametrize("context", ALL, ids=lambda context: context.command_path)
COMMANDS = pytest.mark.parametrize("context", [c for c in ALL if c.parent], ids=lambda context: context.command_path)


def parse(line: list[str]) -> dict[str, Any]:
    """Return the values of the parameters in a command line; files are not looked for."""
    program, name, *arguments = line
    command = PROGRAMS[program].commands[name]
    context = click.Context(command, info_name=name)
    given, rest, _ = command.make_parser(context).parse_args(arguments)
    assert not rest
    chosen = [option for option in command.params if isinstance(option.type, click.Choice) and option.name in given]
    for option in chosen:
        option.type.convert(given[option.name], option, context)
    return given


@pytest.mark.parametrize("line", LINES)
def test_command_line_parses(line: list[str]) -> None:
    assert parse(line) is not None


@EVERY
def test_help_fits_80_columns(context: click.Context) -> None:
    lines = context.command.get_help(context).splitlines()
    assert max(map(len, lines)) <= 80
    listed = lines if isinstance(context.command, click.Group) else []
    assert not [line for line in listed if line.startswith(" ") and line.endswith("...")]


@COMMANDS
def test_help_has_an_example_that_parses(context: click.Context) -> None:
    _, _, after = context.command.get_help(context).partition("\nExample:\n")
    line = shlex.split(after.partition("\n\n")[0].replace("\\\n", " ").partition(" > ")[0])
    assert " ".join(line[:2]) == context.command_path
    required = {parameter.name for parameter in context.command.params if parameter.required}
    assert required <= {name for name, value in parse(line).items() if value}


@COMMANDS
def test_help_shows_defaults_and_headings(context: click.Context) -> None:
    for option in context.command.get_params(context):
        default = option.get_default(context)
        if isinstance(option, click.Option) and not option.is_flag and isinstance(default, int | float | str | Path):
            record = option.get_help_record(context)
            assert record is not None
            assert "[default: " in record[1], option.name
    assert isinstance(context.command, Command)
    options = {option.opts[0] for option in context.command.params if isinstance(option, click.Option)}
    grouped = [name for names in context.command.groups.values() for name in names]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) <= options
    assert len(options) <= 12 or set(grouped) >= options - {"--quiet", "--json"}


@pytest.mark.parametrize(
    ("words", "expected"), [("fractalgen preview --kind a", "all"), ("fractaltrain pt --recipe d", "deit")]
)
def test_shell_completes(monkeypatch: pytest.MonkeyPatch, words: str, expected: str) -> None:
    program, *others = words.split()
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(others)))
    monkeypatch.setenv(f"_{program.upper()}_COMPLETE", "bash_complete")
    completed = subprocess.run([Path(sys.executable).with_name(program)], text=True, capture_output=True).stdout
    assert {line.partition(",")[2] for line in completed.splitlines()} == {expected}
    page = (ROOT / "docs" / "quickstart.md").read_text()
    assert f'eval "$(_{program.upper()}_COMPLETE=bash_source {program})"' in page


def test_studies_are_valid_and_their_build_commands_parse(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "studies.md").read_text(), re.DOTALL)
    (tmp_path / "example.toml").write_text(example)
    studies = [*ROOT.glob("studies/*.toml")]
    assert studies
    for file in (tmp_path / "example.toml", *studies):
        study = read_study(file)
        for run in plan_study(study).finetunings:
            parse(["fractaltrain", *run.command(Path("runs"), Path("data"))])
        commands = {row.shards: shlex.split(row.build) for row in study.pretraining.values() if row.build}
        assert {*commands} == {row.shards for row in study.pretraining.values()}, file.name
        for shards, words in commands.items():
            parse(words)
            kind = f"shards/{words[words.index('--kind') + 1]}" if "--kind" in words else None
            assert shards in words or ("--out" not in words and shards == kind), file.name


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_parameters_of_kinds_are_documented(kind: Kind) -> None:
    assert f"kinds/{kind.name}.md" in (ROOT / "docs" / "kinds.md").read_text()
    based_on = {"multi": "single", "rcdb": "visualatom"}.get(kind.name, kind.name)
    page = "".join((ROOT / "docs" / "kinds" / f"{name}.md").read_text() for name in (kind.name, based_on))
    assert [field.name for field in fields(kind.params) if f"`{field.name}`" not in page] == []


def test_relative_links_outside_of_the_site_exist() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):  # mkdocs checks the others
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{page}: {target}"


PAGE = ROOT / "docs" / "add-a-kind.md"
EXAMPLE = ROOT / "docs" / "examples" / "glow.py"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the generator, changed as the page says."""
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "generator", folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    shutil.copy(EXAMPLE, folder / "fractalgen" / "kinds")
    registry = folder / "fractalgen" / "kinds" / "__init__.py"
    text = registry.read_text()
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE.read_text(), re.DOTALL)
    changes = re.findall(r"^-(.*)\n\+(.*)$", diff, re.MULTILINE)
    assert changes
    for before, after in changes:
        assert f"{before}\n" in text, f"not a line of the registry: {before}"
        text = text.replace(f"{before}\n", f"{after}\n")
    registry.write_text(text)
    return folder


def fractalgen(package: Path, command: str) -> str:
    python = [sys.executable, "-c", "from fractalgen.cli import main; main()", *command.split()]
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "NUMBA_CACHE_DIR": str(package / "cache")}
    result = subprocess.run(python, text=True, capture_output=True, cwd=package, env=environment, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_new_kind_is_listed_drawn_and_built(package: Path) -> None:
    assert "share of the extent that the window" in fractalgen(package, "kinds")
    fractalgen(package, "preview --kind glow --classes 2 --per-class 2 --size 64 --out sheet.png")
    assert (package / "sheet.png").stat().st_size > 1000
    build = "build --kind glow --n 40 --val 10 --classes 5 --size 64 --points 5000 --shard-size 20 --set zoom=1"
    assert "next: fractaltrain pt --shards built" in fractalgen(package, f"{build} --workers 1 --out built")
    manifest = load_manifest(package / "built")
    assert (manifest.recipe["kind"], manifest.recipe["params"]["zoom"]) == ("glow", [1.0, 1.0])
    assert not verify_dataset(manifest, 1)
    with pytest.raises(AssertionError, match=r"error: zoom is 0.5,2.0"):
        fractalgen(package, "build --kind glow --n 40 --classes 5 --set zoom=0.5,2 --out refused")
