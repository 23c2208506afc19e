"""What a source of images is, whatever its form: items, what became of each row or file, and what to doubt.

Messages name a table's line or a class folder, never an image's path or a patient: they may end up in a log.
"""

from __future__ import annotations

import difflib
import json
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

TRAIN, VALIDATION, TEST = 0, 1, 2
SPLIT_NAMES = ("train", "validation", "test")
SPLIT_WORDS = {
    **{"train": TRAIN, "training": TRAIN, "trn": TRAIN},
    **{"val": VALIDATION, "valid": VALIDATION, "validation": VALIDATION, "dev": VALIDATION},
    **{"test": TEST, "testing": TEST, "tst": TEST},
}
NAMED_MAX = 8  # lines, labels or values that one message lists


@dataclass(frozen=True)
class Item:
    """One image that the source names. `where` is safe to log; path and patient are not."""

    where: str  # "metadata.csv:17", "folder benign", "cifar.npz train_images[17]"
    label: str  # the source's own word
    path: Path = field(repr=False)  # the image file, or the .npz file
    row: tuple[str, int] | None = None  # .npz: array name and index
    patient: str | None = field(default=None, repr=False)
    site: str | None = None
    split: int | None = None  # given by the source


@dataclass(frozen=True)
class Source:
    """The images to use, and why the others are not among them: read = items + the sum of `left`."""

    items: tuple[Item, ...]
    read: int = 0  # rows of a table, files of a folder, images of an .npz file
    left: Mapping[str, int] = field(default_factory=Counter)  # why -> how many are not among the items
    unit: str = "rows"
    path: Path = Path()  # the folder, the table or the .npz file
    root: Path = Path()  # what exclude's names are relative to
    excluded: Mapping[str, int] = field(default_factory=dict, repr=False)  # entry of exclude -> images
    unmatched: tuple[str, ...] = field(default=(), repr=False)  # entries of exclude that no image has
    taken: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # column of the filter -> value -> rows taken
    doubts: tuple[str, ...] = ()  # for the operator, safe to log
    likely_patient: str = ""  # a column that may name the patients, where none is in use

    def name(self, item: Item) -> str:
        """The item's name for the operator's own terminal and for `exclude`. Never for a log."""
        if item.row:
            return f"{item.row[0]}[{item.row[1]}]"
        return item.path.relative_to(self.root).as_posix() if item.path.is_relative_to(self.root) else str(item.path)


@dataclass(frozen=True)
class Asked:
    """How the settings of a source are called where somebody made them: an error says what to change there."""

    path: str
    column: str  # {0}: our word for that column, {1}: the table's
    unsplit: str
    place: str
    names_files: bool = False  # what is said goes to the operator's terminal and nowhere else

    @property
    def is_toml(self) -> bool:
        return self.place == "node.toml"

    def columns(self, names: Mapping[str, str]) -> str:
        """The line, or the options, that name these columns of a table."""
        if self.is_toml:
            return f"columns = {toml_table(names)} under [data] in node.toml"
        between = " " if self.column.startswith("--") else " and "
        return between.join(self.column.format(key, shlex.quote(name)) for key, name in names.items())


NODE_TOML = Asked(
    path="data.path",
    column='columns = {{ {0} = "{1}" }} under [data] in node.toml',
    unsplit='columns = { split = "" }',
    place="node.toml",
)
ANCHOR_BUILD = Asked(
    path="--data", column="--column {0}={1}", unsplit="--column split=", place="the command line", names_files=True
)


def toml_table(values: Mapping[str, str]) -> str:
    """An inline table to copy into node.toml; a JSON text is a TOML one too."""
    pairs = (
        f"{key if key.isidentifier() and key.isascii() else json.dumps(key, ensure_ascii=False)} = "
        f"{json.dumps(value, ensure_ascii=False)}"
        for key, value in values.items()
    )
    return f"{{ {', '.join(pairs)} }}"


def first_few(lines: Iterable[str], most: int = NAMED_MAX) -> list[str]:
    """The first few, and how many more."""
    every = list(lines)
    return every[:most] + ([f"... and {len(every) - most} more"] if len(every) > most else [])


def hint(name: str, known: Collection[str]) -> str:
    """`; did you mean 'x'?`, or nothing. Never for a label: the nearest word may be its opposite."""
    folded = {k.casefold(): k for k in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""
