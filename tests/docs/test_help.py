"""The help of every command fits a terminal, has an example that is a valid command line, and shows defaults."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from fractalgen.cli import main as fractalgen
from fractalshards.cli import main as fractalshards
from fractalshards.console import Command
from fractaltrain.cli import main as fractaltrain

PROGRAMS: dict[str, click.Group] = {
    "fractalgen": fractalgen,
    "fractalshards": fractalshards,
    "fractaltrain": fractaltrain,
}
SCREEN = 12  # options beyond which headings are wanted


def contexts() -> Iterator[click.Context]:
    for name, program in PROGRAMS.items():
        parent = click.Context(program, info_name=name, terminal_width=80, **program.context_settings)
        for command_name, command in program.commands.items():
            yield click.Context(command, parent, info_name=command_name, terminal_width=80)


EVERY = pytest.mark.parametrize("context", list(contexts()), ids=lambda context: context.command_path)


@EVERY
def test_no_line_is_wider_than_80_columns(context: click.Context) -> None:
    assert [line for line in context.command.get_help(context).splitlines() if len(line) > 80] == []


@EVERY
def test_there_is_an_example_that_parses(context: click.Context) -> None:
    _, _, after = context.command.get_help(context).partition("\nExample:\n")
    example = after.partition("\n\n")[0].replace("\\\n", " ").partition(" > ")[0]
    program, name, *arguments = shlex.split(example)
    assert f"{program} {name}" == context.command_path
    given, rest_of_line, _ = context.command.make_parser(context).parse_args(arguments)  # its files need not be there
    assert not rest_of_line
    needed = {parameter.name for parameter in context.command.params if parameter.required}
    assert needed <= {name for name, value in given.items() if value}


@EVERY
def test_defaults_are_shown(context: click.Context) -> None:
    for option in context.command.get_params(context):
        default = option.get_default(context)
        if isinstance(option, click.Option) and not option.is_flag and isinstance(default, int | float | str | Path):
            record = option.get_help_record(context)
            assert record is not None
            assert "[default: " in record[1], option.name


@EVERY
def test_many_options_stand_under_headings(context: click.Context) -> None:
    assert isinstance(context.command, Command)
    options = {option.opts[0] for option in context.command.params if isinstance(option, click.Option)}
    named = [name for names in context.command.groups.values() for name in names]
    assert len(named) == len(set(named))
    assert set(named) <= options
    assert len(options) <= SCREEN or set(named) >= options - {"--quiet", "--json"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_lists_of_commands_are_not_cut_short(name: str) -> None:
    context = click.Context(PROGRAMS[name], info_name=name, terminal_width=80, **PROGRAMS[name].context_settings)
    lines = PROGRAMS[name].get_help(context).splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line.startswith(" ") and line.endswith("...")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fractalgen bui", {"build"}),
        ("fractalgen build --kind s", {"single"}),
        ("fractalgen preview --kind a", {"all"}),
        ("fractalshards ver", {"verify"}),
        ("fractaltrain pt --recipe d", {"deit"}),
        ("fractaltrain ft --fre", {"--freeze"}),
    ],
)
def test_the_shell_completes(words: str, expected: set[str]) -> None:
    program, *others = words.split()
    variables = {f"_{program.upper()}_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(others))}
    command = Path(sys.executable).with_name(program)
    result = subprocess.run([command], text=True, capture_output=True, env={**os.environ, **variables})
    assert {line.partition(",")[2] for line in result.stdout.splitlines()} == expected


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_lines_of_the_page_set_completion_up(program: str, shell: str) -> None:
    command = Path(sys.executable).with_name(program)
    variables = {f"_{program.upper()}_COMPLETE": f"{shell}_source"}
    result = subprocess.run([command], text=True, capture_output=True, env={**os.environ, **variables})
    assert f"_{program}_completion" in result.stdout
    page = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text()
    assert f'eval "$(_{program.upper()}_COMPLETE=bash_source {program})"' in page
