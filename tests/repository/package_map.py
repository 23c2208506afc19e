"""Every file of hsl_node with the first line of its docstring, as a tree (`make map`)."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "hsl_node"
COLUMN = 30  # where the sentences begin; the longest name of a file fits


def lines(folder: Path = PACKAGE, depth: int = 0) -> Iterator[tuple[str, str]]:
    """(what stands left, what it promises): a package, its files, then the packages in it."""
    yield "  " * depth + f"{folder.name}/", promise(folder / "__init__.py")
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield "  " * (depth + 1) + path.name, promise(path)
    for inner in sorted(p for p in folder.iterdir() if (p / "__init__.py").exists()):
        yield from lines(inner, depth + 1)


def promise(path: Path) -> str:
    """The first line of the docstring, with "Pure." where its first paragraph ends so further down."""
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    first, _, rest = text.partition("\n\n")[0].partition("\n")
    return f"{first} ... Pure." if rest.endswith("Pure.") else first


def show(width: int) -> str:
    rows = (f"{left:<{COLUMN}}{text}" for left, text in lines())
    return "\n".join(row if len(row) <= width else row[: width - 1] + "…" for row in rows)


if __name__ == "__main__":
    print(show(max(80, shutil.get_terminal_size((160, 24)).columns)))
