"""Every decision says when, of what and whether it holds; the index is that of the files."""

from __future__ import annotations

from itertools import pairwise

from decisions_index import INDEX, SECTIONS, SUBJECTS, decisions, render


def test_the_numbers_are_those_of_the_file_names_and_none_is_missing() -> None:
    found = decisions()
    assert [d.number for d in found] == list(range(1, len(found) + 1))
    assert all(d.path.name.startswith(f"{d.number:04d}-") for d in found)


def test_a_decision_has_a_known_subject_and_says_what_was_chosen() -> None:
    for d in decisions():
        order = [SECTIONS.index(name) for name in d.sections]
        assert d.subject in SUBJECTS and "Choice" in d.sections, d.path.name
        assert all(before < after for before, after in pairwise(order)), d.path.name


def test_what_corrects_a_decision_is_later_and_the_old_one_says_how() -> None:
    found = decisions()
    for d in found:
        text = d.path.read_text()
        for number in d.corrected_by:
            assert d.number < number <= len(found)
            assert f"{number:04d}:" in text.partition("Corrected since.")[2], d.path.name


def test_the_index_is_that_of_the_files() -> None:
    assert INDEX.read_text() == render(decisions()), "out of date: make docs"
