"""Every dependency says in docs/dependencies.md why it is here."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_dependency_has_its_row_and_every_row_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {(name(text), "") for text in project["dependencies"]}
    for extra, texts in project["optional-dependencies"].items():
        wanted |= {(name(text), extra) for text in texts}
    cells = re.findall(r"^\| (`[^|]+) \|", (ROOT / "docs" / "dependencies.md").read_text(), re.M)
    shown = set()
    for cell in cells:
        packages, _, extra = cell.partition(" (extra ")
        shown |= {(package, extra.strip("`)")) for package in re.findall(r"`([a-z0-9-]+)`", packages)}
    assert shown == wanted


def name(requirement: str) -> str:
    return re.split(r"[<>=!~\[; ]", requirement)[0]
