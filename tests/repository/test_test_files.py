"""The tests themselves: no file imports another, none is too long to read, and each lies where its module does."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

from sources import PACKAGE, REPOSITORY, imports

TESTS = REPOSITORY / "tests"
LINES_MAX = 500
# What is about no package: helpers, tests with real processes, campaigns, and what looks at the repository.
ABOUT_NO_PACKAGE = {"helpers", "whole", "chaos", "mutations", "fuzz", "repository"}


def files() -> list[Path]:
    """Test files and conftest files, which nobody may import."""
    return sorted([*TESTS.rglob("test_*.py"), *TESTS.rglob("conftest.py")])


def imported_files(tree: ast.AST) -> set[str]:
    """Test files and conftest among what a module imports."""
    modules = {name.partition(".")[0] for name in imports(tree)}
    return {name for name in modules if name == "conftest" or name.startswith("test_")}


def test_nobody_imports_a_test_file_or_a_conftest() -> None:
    """What two files share is a helper, so that either can be moved and renamed alone."""
    found = {str(path.relative_to(TESTS)): imported_files(ast.parse(path.read_text())) for path in TESTS.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == {}


def test_such_an_import_is_found_wherever_it_stands() -> None:
    for code in ("import test_a", "from conftest import b", "def f():\n    from test_a import b"):
        assert imported_files(ast.parse(code)), code
    assert not imported_files(ast.parse("from contest import test_a"))


def test_no_test_file_is_too_long() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in files()}
    assert len(lengths) > 50, "looked at nothing"
    assert {name: n for name, n in lengths.items() if n > LINES_MAX} == {}


def test_no_two_files_have_one_name() -> None:
    """There are no packages here: the second of a name would not be collected."""
    names = Counter(path.name for path in TESTS.rglob("*.py") if path.name != "conftest.py")
    assert [name for name, count in names.items() if count > 1] == []


def test_folders_are_those_of_the_package() -> None:
    folders = {path.parent.relative_to(TESTS) for path in files()} - {Path()}
    ours = {folder for folder in folders if folder.parts[0] not in ABOUT_NO_PACKAGE}
    assert len(ours) > 10, "looked at nothing"
    assert {str(folder) for folder in ours if not (PACKAGE / folder / "__init__.py").is_file()} == set()
