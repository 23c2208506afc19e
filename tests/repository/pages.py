"""What the pages say, for the tests that hold it against the program: links, commands, sections, tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ADMINISTRATOR = ROOT / "docs" / "administrator"
RESEARCHER = ROOT / "docs" / "researcher"


def all_pages() -> list[Path]:
    """Every page for people; the changelog tells of what was."""
    folders = [ROOT / folder / "README.md" for folder in ("benchmarks", "systemd", "deploy", "tests")]
    return sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *folders} - {ROOT / "CHANGELOG.md"})


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def links(text: str) -> list[str]:
    """Where a page's links and pictures lead inside the repository: PATH, PATH#ANCHOR or #ANCHOR."""
    return re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)\)", _without_fences(text))


def shown(text: str) -> Iterator[str]:
    """The commands in a page's blocks, as they would be typed, without the program's name (`hsl`: of service.md)."""
    for line in text.replace("\\\n", " ").splitlines():
        if found := re.match(r" {4,}(?:\.venv/bin/)?(?:hsl-node|hsl) (.+)", line):
            words = re.split(r"\s(?:#|>)\s", found[1])[0].strip()
            alternatives = re.fullmatch(r"(\w+(?: \| \w+)+)", words)
            yield from words.split(" | ") if alternatives else (words,)


def mentioned(text: str) -> set[str]:
    """The commands in a page's sentences: their names and options are right, but much may be left out."""
    found = re.findall(r"`(?:hsl-node|hsl)\s([^`]+)`", _without_blocks(text))
    return {" ".join(command.split()) for command in found if command != "..."}


def entries(page: Path) -> dict[str, str]:
    """The sections of a page: second-level heading -> text."""
    _, *parts = re.split(r"^## (.*)\n", page.read_text("utf-8"), flags=re.M)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def rows(page: Path) -> dict[str, str]:
    """Of tables whose first cell is a setting in backticks: the setting -> the next cell."""
    return dict(re.findall(r"^\| `([\w.]+)` \| ([^|]*?) ?\|", page.read_text("utf-8"), re.M))


def _without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def _without_blocks(text: str) -> str:
    return re.sub(r"^ {4,}\S.*$", "", _without_fences(text), flags=re.M)
