"""Insert the help of every command into the documentation site.

mkdocs calls this; see mkdocs.yml. A line ``<!-- help: fractalgen -->`` becomes the help of all commands of fractalgen.
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
    """Insert the help; mkdocs calls this for its event of the same name."""
    return _MARK.sub(lambda mark: _describe(mark[1]), markdown)


def _describe(name: str) -> str:
    """Return a section for each command of a program."""
    program = _PROGRAMS[name]
    parent = click.Context(program, info_name=name, **program.context_settings)
    sections = []
    for command_name in program.list_commands(parent):
        command = program.commands[command_name]
        context = click.Context(command, parent, info_name=command_name, terminal_width=80)
        sections.append(f"### {name} {command_name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(sections)
