"""`status --check`: one line and a code that a monitoring system acts on, whatever is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import alarm_codes
import pages
import pytest
from control_server import serving
from snapshots import snapshot

from hsl_node.errors import LocalStateError, WaitTimeout
from hsl_node.federation.names import Digest
from hsl_node.host.layout import Layout
from hsl_node.status import check as module
from hsl_node.status.check import BROKEN, CLASSES, DOWN, LINE_MAX_CHARS, PERSON, WELL, check, class_of, judged
from hsl_node.status.snapshot import from_json
from hsl_node.sync.store.store import Store


def told(state: Path, **more: Any) -> tuple[int, str]:
    async def daemon(op: str, request: dict[str, Any]) -> dict[str, Any]:
        return {"status": snapshot(**more)}

    with serving(state, daemon):
        return check(state)


def warning(code: str, text: str = "something is so") -> dict[str, Any]:
    return {"code": code, "text": text, "since": None, "fix": ""}


def test_every_alarm_is_in_exactly_one_class() -> None:
    assert set(CLASSES) == alarm_codes.codes(alarm_codes.of_package(pages.ROOT / "hsl_node"))
    assert set(CLASSES.values()) == {WELL, PERSON, BROKEN}


@pytest.mark.parametrize(
    ("code", "expected"),
    [("fused 12", PERSON), ("peer paused cyr", PERSON), ("paused", PERSON), ("twice", BROKEN), ("twice cyr", PERSON),
     ("refused by cyr", PERSON), ("keys", BROKEN), ("keys cyr", PERSON), ("data 2", WELL), ("a new one", PERSON)],
)  # fmt: skip
def test_the_class_of_a_code_is_that_of_its_word(code: str, expected: int) -> None:
    assert class_of(code) == expected


def test_a_node_without_an_alarm_is_well_also_while_it_waits(state: Path) -> None:
    assert told(state, warnings=[]) == (0, "well: mercy is waiting, round 3 of 20; 0 of 4 others alive")
    assert told(state, warnings=[warning("data 1")])[0] == 0


def test_a_finished_run_names_no_round_after_its_last(state: Path) -> None:
    over = from_json(snapshot(warnings=[], state="finished", round=21))
    assert judged(over)[1] == "mercy is finished; 0 of 4 others alive"


def test_the_worst_alarm_decides_and_the_others_are_counted(state: Path) -> None:
    both = [warning("silent kim", "no sign of life of kim for 61 min"), warning("influence bob")]
    assert told(state, warnings=both) == (
        1, "needs a person: mercy: silent kim (and 1 more): no sign of life of kim for 61 min",
    )  # fmt: skip
    assert told(state, warnings=[*both, warning("halted", "birch signed two things"), warning("data 1")]) == (
        2, "broken: mercy: halted (and 2 more): birch signed two things",
    )  # fmt: skip


def test_it_is_one_line_without_a_bar_whatever_peers_choose(state: Path) -> None:
    code, line = told(state, warnings=[warning("refused kim", "a\nb | c=1 \x1b[31m" + "x" * 1000)])
    assert (code, "\n" in line, "|" in line, "\x1b" in line) == (1, False, False, False)
    assert len(line) <= LINE_MAX_CHARS


def test_a_node_that_does_not_run_is_down_and_says_how_it_ended(state: Path) -> None:
    assert check(state) == (3, "down: the node is not running")
    store = Store(Layout(state))
    store.journal.set_meta("ended", '{"how": "failed", "at": 1.0, "text": "the port 8922 is in use", "fix": ""}')
    store.journal.record_fused(0, Digest("f" * 64))
    store.close()
    assert check(state) == (3, "down: the node is not running; the port 8922 is in use")


def test_where_nothing_can_be_looked_at_it_is_down(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(tmp_path / "nowhere") == (3, f"down: {tmp_path}/nowhere holds no node.toml")

    def refuse(state: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(state / "run/control.sock"))

    monkeypatch.setattr(module, "fetch", refuse)
    code, line = check(state)
    assert code == 3 and line.startswith("down: user ") and "may not use" in line

    def damaged(state: Path) -> Any:
        raise LocalStateError("the journal cannot be read: malformed")

    monkeypatch.setattr(module, "fetch", damaged)
    assert check(state) == (DOWN, "down: the journal cannot be read: malformed")


def test_a_daemon_that_runs_and_does_not_answer_is_broken(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(state: Path) -> Any:
        raise WaitTimeout("the daemon of s runs but has not answered for 10 s")

    monkeypatch.setattr(module, "fetch", hangs)
    assert check(state) == (2, "broken: the daemon of s runs but has not answered for 10 s")


def test_the_page_for_administrators_has_the_codes_and_the_classes() -> None:
    page = (pages.ADMINISTRATOR / "monitoring.md").read_text()
    rows = dict(re.findall(r"^\| (\d) \| ([a-z ]+) \|", page, re.M))
    assert rows == {str(code): word for code, word in enumerate(module.WORDS)}
    names = dict(zip(("well", "needs a person", "broken"), (WELL, PERSON, BROKEN), strict=True))
    said = {
        name: set(re.findall(r"`([^`]+)`", text)) for name, text in re.findall(r"^- \*\*(.+?)\*\*: (.+?)$", page, re.M)
    }
    for name, code in names.items():
        assert said[name] == {c.replace("*", "PEER" if c not in ("fused *", "data *", "own *") else "N")
                              for c, its in CLASSES.items() if its == code}  # fmt: skip
