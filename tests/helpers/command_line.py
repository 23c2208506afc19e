"""The command line, in this process and as one of its own, and the state directories and files that it works on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import typer
from typer.testing import CliRunner, Result

from hsl_node.admin import enrol
from hsl_node.commands.app import app
from hsl_node.federation import config
from hsl_node.federation.plan import Plan


def run(*arguments: str | Path) -> Result:
    """In this process; an HslError is left in `.exception`, as `main` gets it."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def made(state: Path, name: str = "ash", port: int = 9001) -> Path:
    """An initialised state directory."""
    enrol.init(state, name=name, address=f"127.0.0.1:{port}", listen=None, data=None)
    return state


def federation_file(folder: Path, *states: Path, name: str = "trees", **plan: object) -> Path:
    """A federation.toml of the cards of these states."""
    cards = [next(state.glob("*.card")) for state in states]
    plan = {"method": "fedavg", **plan}
    made = enrol.create(name=name, cards=cards, plan=Plan.model_validate(plan), anchor=None)
    path = folder / f"{name}.toml"
    path.write_text(config.federation_text(made))
    return path


def code(done: Result) -> int:
    """What the process would exit with: `main` turns our errors into their codes."""
    return getattr(done.exception, "exit_code", done.exit_code)


CLI = [sys.executable, "-m", "hsl_node"]


def shell(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program as a process: what a script sees."""
    return subprocess.run(
        [*CLI, *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def commands() -> Iterator[list[str]]:
    """Every command there is, as its words."""

    def walk(group: typer.Typer, words: list[str]) -> Iterator[list[str]]:
        for one in group.registered_commands:
            assert one.callback is not None
            yield [*words, one.name or one.callback.__name__.replace("_", "-")]
        for inner in group.registered_groups:
            assert inner.typer_instance is not None and inner.name is not None
            yield from walk(inner.typer_instance, [*words, inner.name])

    return walk(app, [])
