"""Where the repository is, the syntax trees of all modules of hsl_node, and what a module imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import hsl_node

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = Path(hsl_node.__file__).parent


@cache
def sources() -> dict[str, ast.Module]:
    """Module name -> its syntax tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(
            path.read_text(), filename=str(path)
        )
    return found


def imports(tree: ast.AST, *, lazy: bool = True, types: bool = True) -> Iterator[str]:
    """Everything a module imports, as dotted names. Without `lazy` what its functions import when they are called is
    left out, without `types` what only the type checker reads."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom():
                assert node.level == 0, "relative imports hide who imports whom"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            case ast.FunctionDef() | ast.AsyncFunctionDef() if not lazy:
                pass
            case ast.If(test=ast.Name("TYPE_CHECKING")) if not types:
                for other in node.orelse:
                    yield from imports(other, lazy=lazy, types=types)
            case _:
                yield from imports(node, lazy=lazy, types=types)
