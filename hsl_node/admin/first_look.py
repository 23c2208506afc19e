"""What `init` asks at a terminal: which column is which, and which label is which class.

It shows what is there, and guesses no meaning: whoever types decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hsl_node.errors import escaped
from hsl_node.federation.node_toml import DataConfig
from hsl_node.train.data.listing import read_source
from hsl_node.train.data.tables import is_table, read_rows

SHOWN = 12  # labels, columns
QUESTIONS = (
    ("path", "Which column names the image's file?"),
    ("label", "Which one holds the diagnosis?"),
    ("patient", "Which one holds the patient? (Enter: none; then two images of one patient may be on both sides)"),
)


@dataclass
class Answers:
    """For [data] of node.toml; and the classes, in the federation's order."""

    columns: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    classes: tuple[str, ...] = ()


def ask(data: Path, say: Callable[[str], object], answer: Callable[[str], str]) -> Answers:
    """Raises: DataError: the images can't be listed. EOFError: nobody answers any more."""
    found = Answers()
    if data.is_file() and is_table(data):
        found.columns = _columns(data, say, answer)
    columns = {key: column for key, column in found.columns.items() if key != column}
    counts = Counter(item.label for item in read_source(DataConfig(path=data.absolute(), columns=columns)).items)
    say("Labels: " + _listed([f"{label} ({n} images)" for label, n in counts.most_common()]))
    found.columns = columns
    found.classes = _classes(answer)
    for label in sorted(counts) if found.classes else ():
        if label not in found.classes:
            question = f"{escaped(label, 60)} is which class? (Enter: leave these images out) "
            found.labels[label] = _one_of(found.classes, question, say, answer)
    return found


def _columns(table: Path, say: Callable[[str], object], answer: Callable[[str], str]) -> dict[str, str]:
    read = read_rows(table)
    header = read.header
    first = read.rows[0][1] if read.rows else {}
    say(f"Columns of {table.name}: " + _listed([f"{c} (e.g. {first.get(c, '')})" for c in header]))
    found = {}
    for key, question in QUESTIONS:
        if column := _one_of(header, f"{question} ", say, answer, needed=key != "patient"):
            found[key] = column
    return found


def _classes(answer: Callable[[str], str]) -> tuple[str, ...]:
    """At least two; none: not known yet."""
    said = answer("Classes of the federation, in its order, as negative,positive (Enter: not agreed yet): ")
    return tuple(part.strip() for part in said.split(",") if part.strip())


def _one_of(
    words: Sequence[str],
    question: str,
    say: Callable[[str], object],
    answer: Callable[[str], str],
    *,
    needed: bool = False,
) -> str:
    while True:
        said = answer(question).strip()
        if said in words or not (said or needed):
            return said
        say(f"One of: {', '.join(escaped(word, 60) for word in words)}")


def _listed(found: list[str]) -> str:
    more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(escaped(one, 80) for one in found[:SHOWN]) + more
