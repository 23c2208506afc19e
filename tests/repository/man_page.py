"""docs/hsl-node.1, the manual page: all commands, as the application itself describes them. `make docs` writes it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from hsl_node.commands.app import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "hsl-node.1"
WITHOUT = ("--help", "--install-completion", "--show-completion")


def man_page() -> str:
    group = typer.main.get_command(app)
    return "\n".join(
        [
            '.\\" Written by make docs from the commands themselves: do not edit.',
            '.TH HSL-NODE 1 "" "hsl-node" "User commands"',
            ".SH NAME",
            r"hsl-node \- one hospital's node for HeteroSync Learning",
            ".SH SYNOPSIS",
            r"\fBhsl-node\fR [\-\-state DIR] COMMAND [OPTIONS]",
            ".SH DESCRIPTION",
            _text(str(group.help)),
            ".SH OPTIONS",
            *_options(group),
            ".SH COMMANDS",
            *_commands(group, "hsl-node"),
            ".SH EXIT STATUS",
            "0 done, 2 a wrong command line, 3 the daemon does not run, 10 no node here, 15 something on this machine, "
            "78 the operator's files. All of them: docs/administrator/exit\\-codes.md.",
            "",
        ]
    )


def _commands(group: Any, name: str) -> Iterator[str]:
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{name} {word}")
            continue
        arguments = [_argument(p) for p in command.params if not p.opts[0].startswith("-")]
        yield rf".SS {_text(' '.join([name, word, *arguments, '[OPTIONS]']))}"
        yield _text(inspect.cleandoc(command.help or "").replace("\n\n", "\n.PP\n"))
        yield from _options(command)
        if command.epilog:
            yield f".PP\n{_text(command.epilog)}"


def _argument(param: Any) -> str:
    return str(param.metavar or (param.name.upper() if param.required else f"[{param.name.upper()}]"))


def _options(command: Any) -> Iterator[str]:
    for param in command.params:
        help = param.help or ""
        if param.opts[0] in WITHOUT or not help:
            continue
        value = "" if getattr(param, "is_flag", False) or not param.opts[0].startswith("-") else " " + _metavar(param)
        shown = ", ".join(param.opts) if param.opts[0].startswith("-") else _argument(param)
        yield f".TP\n\\fB{_text(shown)}\\fR{value}\n{_text(help)}"


def _metavar(param: Any) -> str:
    return str(param.metavar or "VALUE")


def _text(text: str) -> str:
    """Of a line's beginning only our own `.PP` is a request."""
    lines = text.replace("\\", "\\e").replace("-", "\\-").split("\n")
    return "\n".join(line if line == ".PP" else re.sub(r"^([.'])", r"\\&\1", line) for line in lines)


if __name__ == "__main__":
    PAGE.write_text(man_page(), encoding="utf-8")
