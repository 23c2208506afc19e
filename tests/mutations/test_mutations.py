"""Each protection, switched off, makes the test fail that is named for it. All tests that notice: `make mutations`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mutants import TEN, Mutant, NotOnce, apply, mutated
from mutations import MUTANTS, PROTECTIONS, REPOSITORY, TABLE, TESTS, recorded, render, run

PACKAGE = REPOSITORY / "hsl_node"
QUICK = sorted({mutant.quick for mutant in MUTANTS})
PARTS = 12


def test_each_of_the_ten_protections_has_a_mutant() -> None:
    assert len(TEN) == 10
    assert {mutant.protection for mutant in MUTANTS} == set(PROTECTIONS)
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_change_applies_once_and_is_python(mutant: Mutant) -> None:
    source = (PACKAGE / mutant.file).read_text()
    changed = mutated(mutant, source)
    assert changed != source
    compile(changed, mutant.file, "exec")


def test_a_change_that_does_not_apply_any_more_is_loud(tmp_path: Path) -> None:
    mutant = MUTANTS[0]
    path = tmp_path / mutant.file
    path.parent.mkdir(parents=True)
    for source in ("", 2 * mutant.old):
        path.write_text(source)
        with pytest.raises(NotOnce, match=re.escape(mutant.file)):
            apply(mutant, tmp_path)
        assert path.read_text() == source


@pytest.mark.sample(12)
@pytest.mark.parametrize("part", range(PARTS))
def test_the_named_tests_pass_with_every_protection_in_place(part: int) -> None:
    """In a copy: that they pass where they stand, they show themselves."""
    quicks = QUICK[part::PARTS]
    outcome = run(None, quicks)
    assert not outcome.broken and not outcome.failed, (outcome.broken, outcome.failed)
    for quick in quicks:
        assert any(test.startswith(f"tests/{quick}") for test in outcome.passed), f"{quick} was not run"


@pytest.mark.sample(6)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_named_test_fails_without_its_protection(mutant: Mutant) -> None:
    outcome = run(mutant, [mutant.quick])
    assert not outcome.broken, outcome.broken
    assert any(test.startswith(f"tests/{mutant.quick}") for test in outcome.failed), f"no test noticed: {mutant.name}"


def test_the_table_has_a_row_for_every_mutant_and_names_tests_that_exist() -> None:
    """What failed is known only to a run of all, but what it says must not outlive what it is about."""
    table = TABLE.read_text()
    for mutant in MUTANTS:
        assert f"| {mutant.protection} | " in table and f"| {mutant.off} | " in table, f"make mutations: {mutant.name}"
        assert f"**{mutant.off}** (`hsl_node/{mutant.file}`)" in table, f"make mutations: {mutant.name}"
    named = re.findall(r"^- `([\w/]+/test_\w+\.py)::(\w+)`", table, re.MULTILINE)
    assert len(named) >= len(MUTANTS)
    for file, name in set(named):
        assert re.search(rf"def {name}\(", (TESTS / file).read_text()), f"make mutations: {file}::{name} is gone"


def test_the_table_is_read_as_it_was_written() -> None:
    """A run of some protections keeps the rows of the others."""
    table = TABLE.read_text()
    assert render(recorded(table)) == table
