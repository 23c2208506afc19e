"""What the pages say of the program is so: commands and options, exit codes, settings. Links: `test_documents.py`."""

from __future__ import annotations

import functools
import re
import shlex
import tomllib
from collections.abc import Callable
from typing import Any

import pages
import pytest
import typer
from pages import ADMINISTRATOR, RESEARCHER, ROOT
from pydantic import BaseModel
from typer.testing import CliRunner

from hsl_node import errors
from hsl_node.commands.app import app
from hsl_node.federation.fusion_rules import FUSION_RULES
from hsl_node.federation.methods import of_methods
from hsl_node.federation.node_toml import NodeConfig
from hsl_node.federation.plan import Plan

PAGES = pages.all_pages()
SHOWN = [(pages.name(p), command) for p in PAGES for command in pages.shown(p.read_text("utf-8"))]
MENTIONED = [(pages.name(p), c) for p in PAGES for c in sorted(pages.mentioned(p.read_text("utf-8")))]

# ------------------------------------------------------------------ README


def test_the_readme_fits_a_screen_and_a_half() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


def test_the_readme_shows_the_main_commands() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    named = {c.split()[0] for c in [*pages.shown(text), *pages.mentioned(text)]}
    assert {"init", "federation", "anchor", "data", "doctor", "start", "status", "evaluate", "report", "demo"} <= named


def test_the_two_commands_are_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^    make ([a-z-]+)", (ROOT / "README.md").read_text(), re.M)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


# ------------------------------------------------------------------ commands


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=[f"{p}: {c[:60]}" for p, c in SHOWN])
def test_a_command_that_a_page_shows_can_be_parsed(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = find(command)
    assert one.callback is not None
    monkeypatch.setattr(one, "callback", _parsed(one.callback))
    done = CliRunner().invoke(app, shlex.split(command))
    assert (done.exit_code, done.stdout) == (0, "parsed\n"), f"{page}: {done.output}"


def test_a_command_that_a_sentence_mentions_exists_with_its_options() -> None:
    assert [f"{page}: {c}" for page, c in MENTIONED if not exists(c)] == []


def test_a_command_or_an_option_that_does_not_exist_is_found() -> None:
    assert exists("peer update --finish NAME") and exists("round history") and exists("federation")
    assert not exists("peer renew") and not exists("peer update --finnish NAME")
    text = "    hsl-node stop    # comment\n\n`hsl-node\nkey rotate` and\n\n    hsl-node pause | resume\n"
    assert (list(pages.shown(text)), pages.mentioned(text)) == (["stop", "pause", "resume"], {"key rotate"})


def find(command: str) -> tuple[Any, list[str]]:
    """The registered command, and the words behind its name. Raises LookupError."""
    words = shlex.split(command)
    if words[0] == "--state":
        words = words[2:]
    group: typer.Typer = app
    while nested := [g for g in group.registered_groups if words and g.name == words[0]]:
        assert nested[0].typer_instance is not None
        group, words = nested[0].typer_instance, words[1:]
    for one in group.registered_commands:
        if one.callback is not None and words and (one.name or one.callback.__name__) == words[0]:
            return one, words[1:]
    raise LookupError(command)


def exists(command: str) -> bool:
    if any(g.name == command for g in app.registered_groups):
        return True  # the group as such: `hsl-node federation`
    if command.split()[0] in ("--version", "--install-completion", "--show-completion"):
        return True  # of the program itself; tests/commands/test_help.py calls them
    try:
        find(command)
    except LookupError:
        return False
    words = shlex.split(command)
    options = [w for w in words if w.startswith("-") and w != "--state"]
    name = [w for w in words if not w.startswith("-")]
    names = [name[:2], name[:1]]
    shown = "".join(CliRunner().invoke(app, [*n, "--help"], env={"COLUMNS": "200"}).output for n in names)
    return all(re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", shown) for option in options)


def _parsed(callback: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(callback)
    def parsed(**options: Any) -> None:
        print("parsed")

    return parsed


# ------------------------------------------------------------------ the pages among each other


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    linked = {(index.parent / link).resolve() for link in pages.links(index.read_text("utf-8"))}
    ours = [*ADMINISTRATOR.glob("*.md"), *RESEARCHER.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert {pages.name(p) for p in ours if p not in linked} == {"docs/README.md"}


def test_a_page_that_the_program_names_is_there_with_the_section() -> None:
    named = [
        (where.relative_to(ROOT).as_posix(), *found)
        for where in (ROOT / "hsl_node").rglob("*.py")
        for found in re.findall(r'(docs/[\w/-]+\.md)(?:, "([^"]+)")?', where.read_text("utf-8"))
    ]
    assert len(named) >= 5
    for where, page, section in named:
        assert (ROOT / page).exists(), f"{where} names {page}"
        assert not section or section in pages.entries(ROOT / page), f"{where} names {page}, {section!r}"


# ------------------------------------------------------------------ exit codes


def test_the_exit_codes_are_those_of_the_errors_and_systemd_keeps_down_the_marked_ones() -> None:
    page = (ADMINISTRATOR / "exit-codes.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| (\d+) \|.*\| ([a-z ]*) ?\|$", page, re.M))
    ours = {getattr(errors, name).exit_code for name in vars(errors) if isinstance(getattr(errors, name), type)}
    assert set(map(int, rows)) == ours | {0, 130}
    unit = (ROOT / "systemd" / "hsl-node.service").read_text()
    (down,) = re.findall(r"^RestartPreventExitStatus=(.*)$", unit, re.M)
    assert [code for code, what in rows.items() if what.strip() == "stays down"] == down.split()


def test_each_exit_code_says_what_to_do() -> None:
    page = (ADMINISTRATOR / "exit-codes.md").read_text("utf-8")
    listed, answered = re.findall(r"^\| (\d+) \|", page, re.M), re.findall(r"^\*\*(\d+)\.\*\* ", page, re.M)
    assert answered == [code for code in listed if code != "0"]


# ------------------------------------------------------------------ settings


def test_the_plans_page_has_each_setting_with_its_default() -> None:
    rows = pages.rows(RESEARCHER / "plan.md")
    defaults = _defaults(Plan)
    assert defaults.pop("settings") is None  # the method's, each by the name of its table:
    settings = {key: setting.default for key, setting in of_methods().items()}
    assert list(rows) == [*defaults, *settings] and "augment.turn" in rows and "hsl.experts" in rows
    told = {name: value_of(cell) for name, cell in rows.items()}
    assert told == defaults | settings


def test_the_enrolment_page_has_each_setting_of_node_toml_with_its_default() -> None:
    rows, defaults = pages.rows(ADMINISTRATOR / "enrol.md"), _defaults(NodeConfig)
    assert list(rows) == list(defaults)
    for name, default in defaults.items():
        if default is not None:
            assert value_of(rows[name]) == default, name
        else:  # in words: none, or what it is then
            assert not re.match(r"`[\d\"]", rows[name]), name


def value_of(cell: str) -> Any:
    """A default as a page writes it: TOML in backticks, several with commas; `none`: there is none.

    >>> value_of('`"a"`, `"b"`'), value_of("`60, 10, 30`"), value_of("`0.5`"), value_of("none")
    (['a', 'b'], [60, 10, 30], 0.5, None)
    """
    if cell == "none":
        return None
    values = tomllib.loads(f"v = [{cell.replace('`', '')}]")["v"]
    return values[0] if len(values) == 1 else values


def _defaults(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every setting of node.toml -> its default; None: none, or required."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= _defaults(field.annotation, f"{name}.")
        else:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            found[prefix + name] = _plain(default) or (None if default in ({}, ()) else default)
    return found


def _plain(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default


def test_the_plans_page_lists_all_fusion_rules() -> None:
    page = (RESEARCHER / "plan.md").read_text("utf-8")
    section = page.partition("The plan's `fusion` says")[2].partition("\n\n")[2]
    listed = re.findall(r"^- `(\w+)`: (.*)$", section.partition("\n\n")[0], re.M)
    assert listed == [(name, rule.line) for name, rule in FUSION_RULES.items()]
