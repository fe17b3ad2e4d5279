"""What the documentation site takes from the software itself: the help of every command.

mkdocs calls this; see mkdocs.yml. A line ``<!-- help: fractalgen -->`` of a page becomes the help of all its commands.
"""

import re
from typing import Any

import click

from fractalgen.cli import main as fractalgen
from fractalshards.cli import main as fractalshards
from fractaltrain.cli import main as fractaltrain

_PROGRAMS: dict[str, click.Group] = {
    "fractalgen": fractalgen,
    "fractalshards": fractalshards,
    "fractaltrain": fractaltrain,
}
_MARK = re.compile(r"^<!-- help: (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the help in; mkdocs's event of that name."""
    return _MARK.sub(lambda mark: _describe(mark[1]), markdown)


def _describe(name: str) -> str:
    """A section for every command of a program."""
    program = _PROGRAMS[name]
    parent = click.Context(program, info_name=name, **program.context_settings)
    sections = []
    for command_name in program.list_commands(parent):
        command = program.commands[command_name]
        context = click.Context(command, parent, info_name=command_name, terminal_width=80)
        sections.append(f"### {name} {command_name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(sections)
