"""The README's commands exist, with the options it shows; its make targets are there. Links: `test_documents.py`."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from hsl_node import errors
from hsl_node.commands.app import app
from hsl_node.federation.fusion_rules import FUSION_RULES

ROOT = Path(__file__).resolve().parents[2]


def commands() -> Iterator[str]:
    """Every `hsl-node ...` line of the README's indented blocks, continued lines joined, comments cut."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        found = re.match(r"    (?:\.venv/bin/)?hsl-node (.+)", line)
        if found:
            words = found[1].split("  #")[0].strip()
            alternatives = re.fullmatch(r"(\w+(?: \| \w+)+)", words)
            yield from words.split(" | ") if alternatives else (words,)


def test_the_readme_shows_the_main_commands() -> None:
    shown = {c.split()[0] for c in commands()}
    assert {"init", "federation", "anchor", "data", "doctor", "start", "status", "evaluate", "report", "demo"} <= shown


@pytest.mark.parametrize("command", list(commands()))
def test_a_command_of_the_readme_can_be_parsed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    group: typer.Typer = app
    while nested := [g for g in group.registered_groups if g.name == words[0]]:
        assert nested[0].typer_instance is not None
        group, words = nested[0].typer_instance, words[1:]
    for one in group.registered_commands:
        if one.callback is not None and (one.name or one.callback.__name__) == words[0]:
            monkeypatch.setattr(one, "callback", _parsed(one.callback))
    done = CliRunner().invoke(app, shlex.split(command))
    assert (done.exit_code, done.stdout) == (0, "parsed\n"), done.output


def test_the_exit_codes_are_those_of_the_errors_and_systemd_keeps_down_the_marked_ones() -> None:
    rows = dict(re.findall(r"^\| (\d+) \|.*\| ([a-z ]*) ?\|$", (ROOT / "README.md").read_text(), re.M))
    ours = {getattr(errors, name).exit_code for name in vars(errors) if isinstance(getattr(errors, name), type)}
    assert set(map(int, rows)) == ours | {0, 130}
    unit = (ROOT / "systemd" / "hsl-node.service").read_text()
    (down,) = re.findall(r"^RestartPreventExitStatus=(.*)$", unit, re.M)
    assert [code for code, what in rows.items() if what.strip() == "stays down"] == down.split()


def test_the_two_commands_are_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make ([a-z-]+)", (ROOT / "README.md").read_text(), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_the_readme_lists_all_fusion_rules() -> None:
    section = (ROOT / "README.md").read_text().partition("The plan's `fusion` says")[2].partition("\n\n")[2]
    listed = re.findall(r"^- `(\w+)`: (.*)$", section.partition("\n\n")[0], re.M)
    assert listed == [(name, rule.line) for name, rule in FUSION_RULES.items()]


def _parsed(callback: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(callback)
    def parsed(**options: Any) -> None:
        print("parsed")

    return parsed
