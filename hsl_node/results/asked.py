"""Which images `predict` is asked for: files, folders and tables -> a list of files, the same at each call.

Whatever is named, in a table too, is tried, and told where it cannot be read. Of a folder what is an image by its
content, or calls itself one, in all folders below; the rest is counted.
"""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hsl_node.errors import DataError, UsageError
from hsl_node.federation.node_toml import load_node
from hsl_node.host.layout import Layout
from hsl_node.train.data.folders import is_hidden, walk_once
from hsl_node.train.data.images import looks_like_image
from hsl_node.train.data.sources import hint
from hsl_node.train.data.tables import find_file, find_likely, is_table, read_rows


@dataclass(frozen=True)
class Asked:
    files: tuple[Path, ...]
    lines: dict[int, str]  # position -> where a table names it: "scans.csv:17"
    left_out: Counter[str]  # why -> how many, of folders

    def left_out_text(self) -> str:
        return ", ".join(f"{count} {why}" for why, count in sorted(self.left_out.items()))


def gather(names: Sequence[Path], column: str = "path") -> Asked:
    """`column`: the one of a table that holds the file's path, which counts from the table's own folder.

    Raises:
        UsageError: an array file, or nothing to predict at all.
        DataError: a table that cannot be read, has no such column, or names no file.
    """
    files: list[Path] = []
    lines: dict[int, str] = {}
    left_out: Counter[str] = Counter()
    for name in names:
        if os.path.isdir(name):
            files += _walk(name, left_out)
        elif is_table(name) and os.path.isfile(name):
            for line, file in _rows(name, column):
                lines[len(files)] = f"{name.name}:{line}"
                files.append(file)
        elif name.suffix.lower() == ".npz":
            raise UsageError(
                f"{name} holds arrays; predict takes image files", remedy="give files, a folder of them, or a table"
            )
        else:
            files.append(name)
    asked = Asked(tuple(files), lines, +left_out)
    if not files:
        rest = f" ({asked.left_out_text()})" if asked.left_out else ""
        raise UsageError(
            f"{', '.join(map(str, names))}: no images{rest}",
            remedy="give image files (PNG, JPEG, TIFF, BMP, DICOM ...), a folder with some, or a table that names some",
        )
    return asked


def require_no_input(out: Path, names: Sequence[Path]) -> None:
    """Results never take the place of an image or of a table: `--out *.png` would. Raises: UsageError."""
    if os.path.isfile(out) and (looks_like_image(out) or any(os.path.exists(n) and out.samefile(n) for n in names)):
        raise UsageError(f"--out {out} is an image, or one of the inputs", remedy="name another file for the results")


def column_of(state: Path | None) -> str:
    """A table's column with the path, where the command does not say it: node.toml's, where a node's model is meant."""
    known = state is not None and Layout(state).node_toml.exists()
    return (load_node(state).data.columns.get("path") if known and state else None) or "path"


def _walk(root: Path, left_out: Counter[str]) -> list[Path]:
    """Image files below a folder, sorted; links are followed, each folder once. A folder that cannot be listed stands
    among them: what is in it would be missing without a word."""
    found: list[Path] = []
    for folder, below, names in walk_once(root, lambda exc: found.append(Path(exc.filename))):
        left_out["hidden or system folders"] += sum(map(is_hidden, below))
        below[:] = [name for name in below if not is_hidden(name)]
        for name in names:
            path = folder / name
            if is_hidden(name):
                left_out["hidden or system files"] += 1
            elif looks_like_image(path):
                found.append(path)
            else:
                left_out["files that are no images"] += 1
    return sorted(found)


def _rows(table: Path, column: str) -> Iterator[tuple[int, Path]]:
    found = read_rows(table)
    if column not in found.header:
        likely = find_likely("path", found.header)
        raise DataError(
            f"{table.name}:1: no column {column!r} for the path{hint(column, found.header)}",
            remedy=f"columns here: {', '.join(found.header)}; "
            + (f"if this is the one: --column {shlex.quote(likely)}" if likely else "name it with --column"),
        )
    for line, row in found.rows:
        yield line, find_file(table.parent, row[column])
