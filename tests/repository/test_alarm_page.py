"""Every alarm that the program can raise has its entry on the administrator's page, and there is no other entry."""

from __future__ import annotations

import re

import alarm_codes
import pages
import pytest

from hsl_node.node.alarms import BY_PEERS, KINDS

PAGE = pages.ADMINISTRATOR / "alarms.md"


def written() -> set[str]:
    """The entries of the page, with `*` for what varies: PEER, N."""
    return {re.sub(r"\b(PEER|N)\b", "*", heading) for heading in pages.entries(PAGE)}


def test_every_alarm_has_its_entry_and_every_entry_its_alarm() -> None:
    found = alarm_codes.codes(alarm_codes.of_package(pages.ROOT / "hsl_node"))
    assert written() == found


def test_every_alarm_that_the_daemon_sounds_is_a_kind_and_every_kind_is_sounded() -> None:
    """`BY_PEERS` decides how long one is shown: whoever adds an alarm must have looked there."""
    assert alarm_codes.sounded(alarm_codes.of_package(pages.ROOT / "hsl_node")) == KINDS | BY_PEERS
    assert not KINDS & BY_PEERS


def test_every_entry_says_what_to_do() -> None:
    assert [code for code, text in pages.entries(PAGE).items() if "**Do:**" not in text] == []


def test_the_entries_are_sorted() -> None:
    assert (order := list(pages.entries(PAGE))) == sorted(order, key=lambda code: code.replace("PEER", "").strip())


def test_the_table_that_finds_an_alarm_by_its_words_leads_to_every_entry() -> None:
    finder = PAGE.read_text().partition("**Find it by")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"\[([^]]+)\]\(#", finder)) == sorted(pages.entries(PAGE))


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("alarms.sound('fire', text, fix)", "fire"),
        ("self._node.alarms.sound(f'fire {peer}', text, fix, since=now)", "fire *"),
        ("FIRE = 'fire'\nalarms.sound(FIRE, text, fix)", "fire"),
        ("node.journal.note('warning', f'fire {code}', text)", "fire *"),
        ("warnings.append(StatusWarning('fire', text, None, fix))", "fire"),
        ("def warnings_of(ring):\n    found[f'fire {peer}'] = text, fix", "fire *"),
    ],
)
def test_a_new_alarm_is_found_in_the_source_and_missed_on_the_page(source: str, code: str) -> None:
    assert alarm_codes.codes({"new.py": source}) == {code}
    assert code not in written()


def test_an_alarm_whose_code_is_made_in_an_unknown_way_is_a_failure() -> None:
    with pytest.raises(alarm_codes.Unknown, match=r"new.py:1: names\[3\]"):
        alarm_codes.codes({"new.py": "alarms.sound(names[3], text, fix)"})
