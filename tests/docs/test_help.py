"""The help of every command fits a terminal, has an example that parses, shows defaults, and completes in the shell."""

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
MANY = 12  # more options than this need headings


def contexts() -> Iterator[click.Context]:
    for name, program in PROGRAMS.items():
        parent = click.Context(program, info_name=name, terminal_width=80, **program.context_settings)
        for command_name, command in program.commands.items():
            yield click.Context(command, parent, info_name=command_name, terminal_width=80)


EVERY = pytest.mark.parametrize("context", list(contexts()), ids=lambda context: context.command_path)


@EVERY
def test_help_fits_80_columns(context: click.Context) -> None:
    assert [line for line in context.command.get_help(context).splitlines() if len(line) > 80] == []


@EVERY
def test_example_parses(context: click.Context) -> None:
    _, _, after = context.command.get_help(context).partition("\nExample:\n")
    example = after.partition("\n\n")[0].replace("\\\n", " ").partition(" > ")[0]
    program, name, *arguments = shlex.split(example)
    assert f"{program} {name}" == context.command_path
    given, rest, _ = context.command.make_parser(context).parse_args(arguments)  # does not look for files
    assert not rest
    required = {parameter.name for parameter in context.command.params if parameter.required}
    assert required <= {name for name, value in given.items() if value}


@EVERY
def test_defaults_are_shown(context: click.Context) -> None:
    for option in context.command.get_params(context):
        default = option.get_default(context)
        if isinstance(option, click.Option) and not option.is_flag and isinstance(default, int | float | str | Path):
            record = option.get_help_record(context)
            assert record is not None
            assert "[default: " in record[1], option.name


@EVERY
def test_many_options_have_headings(context: click.Context) -> None:
    assert isinstance(context.command, Command)
    options = {option.opts[0] for option in context.command.params if isinstance(option, click.Option)}
    grouped = [name for names in context.command.groups.values() for name in names]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) <= options
    assert len(options) <= MANY or set(grouped) >= options - {"--quiet", "--json"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_list_of_commands_is_not_cut_short(name: str) -> None:
    context = click.Context(PROGRAMS[name], info_name=name, terminal_width=80, **PROGRAMS[name].context_settings)
    lines = PROGRAMS[name].get_help(context).splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line.startswith(" ") and line.endswith("...")]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("fractalgen preview --kind a", {"all"}),
        ("fractaltrain pt --recipe d", {"deit"}),
    ],
)
def test_shell_completes(monkeypatch: pytest.MonkeyPatch, words: str, expected: set[str]) -> None:
    program, *others = words.split()
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(others)))
    monkeypatch.setenv(f"_{program.upper()}_COMPLETE", "bash_complete")
    lines = subprocess.run(
        [Path(sys.executable).with_name(program)], text=True, capture_output=True
    ).stdout.splitlines()
    assert {line.partition(",")[2] for line in lines} == expected
    page = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text()
    assert f'eval "$(_{program.upper()}_COMPLETE=bash_source {program})"' in page
