"""The table of threats in tests/README.md is that of the tests as they are."""

from __future__ import annotations

import re
from collections import Counter

from threat_table import TABLE, TESTS, THREATS, WITHOUT_TESTS, missing, parse, render, written

CASES_MIN = 300  # over all threats; the table has the figure


def test_every_threat_has_a_test() -> None:
    assert missing(written()) == WITHOUT_TESTS


def test_every_threat_is_answered_by_make_test_whatever_the_day() -> None:
    assert missing(written(surely=True)) == WITHOUT_TESTS
    assert {row for row, _, _ in written() - written(surely=True)} >= {12, 21, 22, 23}, "no campaign was seen"


def test_the_table_names_the_tests_that_exist() -> None:
    table = parse(TABLE.read_text())
    assert set(table) == written(), "out of date: make threats"
    assert table.total() >= CASES_MIN
    assert TABLE.read_text() == render(table)


def test_every_name_of_a_threat_has_two_digits_and_a_row() -> None:
    """Else it would drop out of the table without a word."""
    numbers = {n for path in TESTS.rglob("test_*.py") for n in re.findall(r"def test_threat_(\d+)", path.read_text())}
    assert all(len(n) == 2 and int(n) in THREATS for n in numbers), numbers


def test_a_table_is_read_back_the_same() -> None:
    cases = Counter({(1, "test_a.py", "no name leads out"): 7, (31, "test_b.py", "nobody straddles"): 1})
    assert parse(render(cases)) == cases
    assert missing(cases) == set(range(2, 31))
