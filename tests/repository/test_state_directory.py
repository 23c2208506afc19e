"""docs/state-directory.md has a line for every path that the code spells, and none for one that it does not."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import hsl_node
from hsl_node.host.layout import Layout

PACKAGE = Path(hsl_node.__file__).parent
PAGE = PACKAGE.parent / "docs" / "state-directory.md"
# Files of the same names: what an archive may hold is its format; the demo has a folder of its own; an error's place.
OTHERS_NAMES = {"admin/archive.py", "demo/setup.py", "train/data/sources.py"}
MADE_BY_OTHERS = {"journal.sqlite3-wal", "journal.sqlite3-shm"}  # SQLite's own


def rows() -> list[str]:
    """The paths of the table as patterns, without the final slash of a folder."""
    cells = re.findall(r"^\| (`[^|]+`[^|]*) \|(.*)\|.*\|$", PAGE.read_text(), re.M)
    first = [re.findall(r"`([^`]+)`", cell)[0] for cell, _ in cells]
    also = [name for _, text in cells for name in re.findall(r"`((?:journal|trainer/)[^` ]+)`", text)]
    return [re.sub(r"rNNNNNN|PEER|NAME|(?<=_)N|DATE", "*", path.rstrip("/")) for path in [*first, *also]]


def spelled(source: str) -> Iterator[str]:
    """Every `state / "a" / "b"`, as a pattern; `state` may be an attribute; what is no constant is `*`."""
    tree = ast.parse(source)
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def piece(node: ast.expr) -> str:
        match node:
            case ast.Constant(str(text)):
                return text
            case ast.Name(name) if name in constants:
                return constants[name]
            case ast.JoinedStr(values):
                return "".join(str(v.value) if isinstance(v, ast.Constant) else "*" for v in values)
            case _:
                return "*"

    def chain(node: ast.expr) -> list[str] | None:
        match node:
            case ast.BinOp(left, ast.Div(), right):
                before = chain(left)
                return None if before is None else [*before, piece(right)]
            case ast.Name("state") | ast.Attribute(_, "state"):
                return []
            case _:
                return None

    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and (pieces := chain(node)):
            yield "/".join(pieces)


def of_the_layout() -> set[str]:
    state = Path("/state")
    layout = Layout(state)
    found = {*vars(layout).values()} - {state}
    found |= {
        layout.outbox(12),
        layout.inbox(12, "mercy"),
        layout.fused(12),
        layout.card("mercy"),
        layout.update("a", 1),
    }
    return {str(path.relative_to(state)) for path in found}


def is_on_the_page(path: str, page: list[str]) -> bool:
    """A file has its row; a folder is the beginning of one."""
    wanted = path.split("/")
    return any(
        len(row) >= len(wanted) and all(fnmatch(a, b) or fnmatch(b, a) for a, b in zip(wanted, row, strict=False))
        for row in (pattern.split("/") for pattern in page)
    )


def test_every_path_of_the_layout_is_on_the_page() -> None:
    page = rows()
    assert [path for path in sorted(of_the_layout()) if not is_on_the_page(path, page)] == []


def test_no_other_module_spells_one() -> None:
    """Neither as `state / "keys"` nor a file's whole name."""
    names = {path.name for path in vars(Layout(Path("/state"))).values() if path.suffix} - {"anchor.safetensors"}
    elsewhere = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module, source = str(path.relative_to(PACKAGE)), path.read_text()
        words = {n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and n.value in names}
        if module == "host/layout.py":
            assert "journal.sqlite3" in set(spelled(source)) & words, "else the walk saw nothing"
        else:
            found = {*spelled(source), *(words if module not in OTHERS_NAMES else ())} - {"*"}
            elsewhere += [(module, spelt) for spelt in sorted(found)]
    assert elsewhere == []


def test_what_the_page_names_is_spelled_in_the_code() -> None:
    """By its last word: the path before it may be put together."""
    literals = {
        text
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for text in node.value.split()
    }
    for row in rows():
        words = [w for w in re.split(r"[/*_]", row) if w and w != "r"]
        missing = [w for w in words if w not in literals and not any(w in text for text in literals)]
        assert row in MADE_BY_OTHERS or not missing, row


def test_a_path_that_is_not_on_the_page_is_found() -> None:
    page = rows()
    assert not is_on_the_page("inbox2", page) and not is_on_the_page("trainer/epoch.pt/more", page)
    assert is_on_the_page("inbox/r000012", page)
    assert list(spelled('x = layout.state / "run" / f"a{b}"')) == ["run/a*", "run"]
