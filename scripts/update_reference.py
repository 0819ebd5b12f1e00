"""Write what docs/ has from the code: python scripts/update_reference.py.

docs/longrope-factors.schema.json, and docs/commands.md, the help of every command.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from longrope_export.cli import COMMANDS, main
from longrope_export.outputs import write_text
from longrope_export.schema import factors_schema

DOCS = Path(__file__).parent.parent / "docs"
SCHEMA = DOCS / "longrope-factors.schema.json"
REFERENCE = DOCS / "commands.md"
PROGRAM = "longrope-export"
WIDTH = 100  # characters of a line of help
HEAD = """# Every command and option

What `longrope-export COMMAND --help` says; written by `scripts/update_reference.py`.
"""


def walk_commands() -> Iterator[tuple[str, click.Command]]:
    """Every command by its full name, as `llama-cpp build`: those of the group, each before its own."""
    context = click.Context(main)
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            for inner, child in command.commands.items():
                yield f"{name} {inner}", child


def schema_text() -> str:
    return json.dumps(factors_schema(), indent=2) + "\n"


def reference_text() -> str:
    """docs/commands.md."""
    parts = [HEAD]
    for name, command in walk_commands():
        context = click.Context(
            command,
            info_name=f"{PROGRAM} {name}",
            terminal_width=WIDTH,
            max_content_width=WIDTH,
            help_option_names=["-h", "--help"],
        )
        parts.append(f"## {name}\n\n```\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    write_text(SCHEMA, schema_text())
    write_text(REFERENCE, reference_text())
    print(SCHEMA, REFERENCE, sep="\n")
