"""Which tests `make test` runs in part or not at all, read from their marks: a table for tests/README.md."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ALONE = re.compile(r"pytest\.mark\.sample\((.+)\)")
TOGETHER = re.compile(r"pytest\.mark\.sample\((.+), '(.+)'\)")

HEAD = """\
## What `make test` leaves to `make test-all`

| `make test` runs | `make test-all` runs |
|---|---|
| every test but those below | every test |
| of each campaign below one case in so many; other cases each day, after as many days all of them | all cases |
| a quarter of the examples of `test_round_simulation.py` | all of them |

It prints which sample that was; `HSL_TEST_SAMPLE=N make test` repeats one. Some case of each threat is in every sample.

| one in | campaign | file |
|---|---|---|
"""


def marked(folder: Path = TESTS) -> Iterator[tuple[str, str, list[str]]]:
    """File, name and marks of every test."""
    for path in sorted(folder.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                yield path.name, node.name, [ast.unparse(mark) for mark in node.decorator_list]


def surely_in_make_test(marks: list[str]) -> bool:
    """Of several tests that are one campaign, or of what is left out, there may be none on a day."""
    left_out = {"pytest.mark.full", "pytest.mark.slow"}
    return not any(mark in left_out or TOGETHER.fullmatch(mark) for mark in marks)


def table() -> str:
    rows = []
    together: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file, name, marks in marked():
        said = name.removeprefix("test_").replace("_", " ")
        for mark in marks:
            if found := TOGETHER.fullmatch(mark):
                together[found[1], found[2]].append(file)
            elif found := ALONE.fullmatch(mark):
                rows.append((found[1], said, [file]))
            elif mark in ("pytest.mark.full", "pytest.mark.slow"):
                rows.append(("none", said, [file]))
            elif "pytest.mark.full" in mark:
                rows.append(("not all", said, [file]))
    rows += [
        (one_in, f"{campaign}: {len(files)} tests", list(dict.fromkeys(files)))
        for (one_in, campaign), files in together.items()
    ]
    lines = [f"| {one_in} | {what} | {', '.join(f'`{file}`' for file in files)} |" for one_in, what, files in rows]
    return HEAD + "\n".join(lines) + "\n"
