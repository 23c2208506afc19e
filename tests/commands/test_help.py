"""The command line explains itself: every command, its help, its example."""

from __future__ import annotations

import functools
import json
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from command_line import commands, run, shell

from hsl_node.commands.app import app

COMMANDS = sorted(" ".join(words) for words in commands())


def test_the_commands_are_these() -> None:
    single = (
        "init card start stop status pause resume logs doctor version evaluate predict export report demo "
        "backup restore recover verify"
    )
    grouped = {
        "federation": "create plan show join diff", "peer": "list ping revoke update", "key": "rotate updates",
        "anchor": "build verify", "data": "check",
        "round": "history show", "inbox": "provision",
    }  # fmt: skip
    expected = [
        *single.split(),
        "support-bundle",
        *(f"{group} {word}" for group, words in grouped.items() for word in words.split()),
    ]
    assert sorted(expected) == COMMANDS


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_explains_itself_with_an_example_that_names_it(words: str) -> None:
    done = run(*words.split(), "--help")
    assert done.exit_code == 0
    text = " ".join(done.stdout.split())
    assert f"Example: hsl-node {words}" in text
    summary = done.stdout.splitlines()[2].strip()
    assert summary.endswith(".") and len(summary) < 80, "the first sentence is what the list of commands shows"


@pytest.mark.parametrize("words", COMMANDS)
def test_what_the_example_of_a_command_says_can_be_parsed(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options and arguments of the example exist: the help never shows what would be a usage error."""
    example = " ".join(run(*words.split(), "--help").stdout.split()).split("Example: hsl-node ")[1].split(" > ")[0]
    *groups, name = words.split()
    group = app
    for word in groups:
        group = next(g.typer_instance for g in group.registered_groups if g.name == word)  # type: ignore[misc]
    for one in group.registered_commands:
        if (one.name or one.callback.__name__) == name:  # type: ignore[union-attr]
            monkeypatch.setattr(one, "callback", _same_signature(one.callback))
    done = run(*shlex.split(example))
    assert done.exit_code == 0 and done.stdout == "parsed\n", done.output


def _same_signature(callback: Callable[..., Any] | None) -> Callable[..., Any]:
    assert callback is not None

    @functools.wraps(callback)
    def parsed(**options: Any) -> None:
        print("parsed")

    return parsed


def test_without_arguments_it_shows_the_help() -> None:
    done = shell()
    assert done.returncode == 2 and "Usage: hsl-node" in done.stderr


@pytest.mark.parametrize("words", [[], ["federation"], ["anchor"]])
def test_the_list_of_commands_fits_80_columns_without_cutting_a_sentence_short(words: list[str]) -> None:
    lines = shell(*words, "--help", COLUMNS="80").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line.endswith("...") and not line.startswith("Usage")]


def test_the_help_names_every_command_once_under_its_panel() -> None:
    shown = [line.split()[0] for line in shell("--help").stdout.splitlines() if line.startswith("  ") and line.split()]
    for word in {words.split()[0] for words in COMMANDS}:
        assert shown.count(word) == 1, word


def test_the_version_names_the_commit_of_a_checkout() -> None:
    done = run("--version")
    assert done.exit_code == 0
    assert re.fullmatch(r"hsl-node \d+\.\d+\.\d+( \(commit [0-9a-f]{10}\+?\))?\n", done.stdout)
    assert json.loads(run("version", "--json").stdout)["commit"]


@pytest.mark.parametrize("kind", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options(kind: str) -> None:
    script = shell("--show-completion", kind, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")  # ours is not `kind`
    assert script.returncode == 0 and "hsl-node" in script.stdout
    words = {"COMP_WORDS": "hsl-node fed", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "hsl-node fed"}
    done = shell(_HSL_NODE_COMPLETE=f"complete_{kind}", _TYPER_COMPLETE_FISH_ACTION="get-args", **words)
    assert "federation" in done.stdout, done
