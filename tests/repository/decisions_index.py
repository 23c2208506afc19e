"""The index of docs/decisions, by subject: written from the first lines of each decision (`make docs`)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "decisions"
INDEX = FOLDER / "README.md"
SUBJECTS = {
    "round": "The round: what peers sign, wait for and fuse",
    "exchange": "The exchange: files, connections, limits",
    "recovery": "Lost, altered and set back states",
    "equivocation": "Two signatures for one round",
    "keys": "Keys, signatures, membership",
    "learning": "The learning",
    "operating": "Operating a node",
    "code": "The code itself",
}
SECTIONS = ("Context", "Choice", "Refused", "Left", "What would change our mind")  # in this order; Choice alone must be

HEAD = """\
# Decisions

One file each: what the question was, what was chosen, what was refused, what is left, and what would change our mind. A
decision is not rewritten when it turns out wrong: a new one takes the next number, and the old one's status names it. A
new file begins as these do; `make docs` writes this list.
"""

_HEADING = re.compile(
    r"# (?P<number>\d{4})\. (?P<title>[^\n]+)\n\n"
    r"- date: (?P<date>\d{4}-\d\d-\d\d)\n- subject: (?P<subject>\w+)\n"
    r"- status: (?:holds|corrected by (?P<corrected_by>\d{4}(?:, \d{4})*))\n\n"
)


@dataclass(frozen=True)
class Decision:
    path: Path
    number: int
    title: str
    date: str
    subject: str
    corrected_by: tuple[int, ...]  # empty: it holds
    sections: tuple[str, ...]

    @property
    def link(self) -> str:
        return f"[{self.number:04d}]({self.path.name})"


def decisions() -> list[Decision]:
    """Raises: ValueError: a file does not begin as a decision does."""
    return [_read(path) for path in sorted(FOLDER.glob("*.md")) if path != INDEX]


def _read(path: Path) -> Decision:
    text = path.read_text()
    found = _HEADING.match(text)
    if found is None:
        raise ValueError(f"{path.name} does not begin with number, title, date, subject and status")
    by = tuple(int(number) for number in (found["corrected_by"] or "").split(", ") if number)
    sections = tuple(re.findall(r"^## (.+)$", text, re.M))
    return Decision(path, int(found["number"]), found["title"], found["date"], found["subject"], by, sections)


def render(found: list[Decision]) -> str:
    of = {decision.number: decision for decision in found}
    lines = [HEAD]
    for subject, title in SUBJECTS.items():
        lines += [f"## {title}", "", "| no. | decision | status |", "|---|---|---|"]
        for decision in found:
            if decision.subject == subject:
                status = "corrected by " + ", ".join(of[n].link for n in decision.corrected_by)
                lines.append(f"| {decision.link} | {decision.title} | {status if decision.corrected_by else 'holds'} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    INDEX.write_text(render(decisions()))
