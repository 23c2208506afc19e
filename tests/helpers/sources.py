"""Where the repository is, and the syntax trees of all modules of hsl_node."""

from __future__ import annotations

import ast
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
