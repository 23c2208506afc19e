"""Images named by a table: CSV from any spreadsheet or database. Every row is accounted for."""

from __future__ import annotations

import csv
import fnmatch
import io
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from hsl_node.errors import DataError
from hsl_node.federation.node_toml import DataConfig
from hsl_node.train.data.sources import NODE_TOML, SPLIT_WORDS, Asked, Item, Source, first_few, hint, toml_table

COLUMNS = ("path", "label", "patient", "site", "split")
REQUIRED = ("path", "label")
LIKELY = {  # our word -> what tables call it, best first; compared by letters and digits alone
    "path": ("path", "file", "filename", "image", "imagepath", "filepath", "imagefile", "imagename", "img", "dicom"),
    "label": ("label", "class", "diagnosis", "pathology", "category", "target", "finding", "dx"),
    "patient": (
        *("patient", "patientid", "patientnumber", "patid", "subject", "subjectid", "case", "caseid", "pid", "mrn"),
        *("pseudonym", "person", "personid", "participant", "participantid", "pat", "patientnr", "patientkey"),
    ),
}
SUFFIXES = (".csv", ".tsv", ".txt", ".xlsx", ".xls", ".ods")  # the last three are told that they are workbooks
DELIMITERS = ",;\t|"
PROBED = 100  # rows that tell what separates the cells
WIDTH_MAX = 1024 * 1024  # characters of a cell; the csv module's own 128 KiB fails on a report's full text


@dataclass(frozen=True)
class Table:
    """Cells are stripped. A row that is short lacks its last cells: they are empty here."""

    header: tuple[str, ...]
    rows: tuple[tuple[int, dict[str, str]], ...]  # each with its line
    empty: int = 0  # rows without a cell that holds anything
    doubts: tuple[str, ...] = ()


def is_table(path: Path) -> bool:
    """By its name: what else could tell a list of files from any other text?"""
    return path.suffix.lower() in SUFFIXES


def read_rows(path: Path) -> Table:
    """Read a table in UTF-8, UTF-16 or Windows-1252; separated by comma, semicolon, tab or a bar.

    Raises:
        DataError: not a table, or rows with more cells than the header, each with its line.
    """
    try:
        csv.field_size_limit(WIDTH_MAX)
        text, doubt = _text(path.read_bytes())
        declared = re.match(r'"?sep=(.)"?\r?\n', text, re.IGNORECASE)  # a spreadsheet's own first line
        lines = io.StringIO(text, newline="")
        if declared:
            lines.readline()
        delimiter = declared[1] if declared else _delimiter(text)
        blank = f'{delimiter} "' in text[:WIDTH_MAX].partition("\n")[0]  # some programs write one after each separator
        reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=blank, strict=True)
        header = [unicodedata.normalize("NFC", name.strip()) for name in next(reader, [])]
        skipped = 1 if declared else 0
        cells = [(reader.line_num + skipped, [cell.strip() for cell in row], any(row)) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise DataError(
            f"{path.name}: cannot be read as a table: {exc}",
            remedy="save it as CSV in UTF-8, a quote inside a cell written twice",
        ) from exc
    filled = [(line, row) for line, row, any_cell in cells if any_cell]
    doubts = [f"{path.name} {doubt}"] if doubt else []
    width = len(header)
    _require_header(path, filled, header)
    _require_narrow(path, filled, header)
    swallowed = [line for line, row in filled if any(_holds_rows(cell, delimiter, width) for cell in row)]
    if 0 < len(swallowed) * 4 < len(filled):  # in more rows it is a column of long texts
        doubts.append(
            f"{len(swallowed)} cells hold lines that look like rows: is a quote not closed? {path.name}, up"
            f" to line {', '.join(first_few(map(str, swallowed)))}"
        )
    if short := [line for line, row in filled if len(row) < width]:
        doubts.append(
            f"{len(short)} of {len(filled)} rows have fewer cells than the header, so that a value may stand in the"
            f" wrong column: {path.name}, line {', '.join(first_few(map(str, short)))}"
        )
    rows = tuple((line, dict(zip(header, [*row, *[""] * width], strict=False))) for line, row in filled)
    return Table(tuple(header), rows, len(cells) - len(filled), tuple(doubts))


def read_table(path: Path, data: DataConfig, asked: Asked = NODE_TOML) -> Source:
    """Raises: DataError."""
    table = read_rows(path)
    names = _column_names(path, table, data, asked)
    _require_one_of_each(path, table.header, {*names.values(), *data.filter})
    private = {names[key] for key in ("path", "patient") if key in names}
    rows, left, taken = _filtered(path, table, data.filter, private)
    items = [_row_item(path, line, row, names, asked) for line, row in rows]
    unnamed = {f"{path.name}:{line}" for line, row in rows if not row[names["path"]]}
    absent = [i for i in items if i.where in unnamed or not os.path.isfile(i.path)]
    missing = [i for i in items if not i.label]
    if absent or missing:
        looked = {i.where: "the path is empty" if i.where in unnamed else str(i.path) for i in absent}
        listed = [f"{i.where}: no such image file" + f": {looked[i.where]}" * asked.names_files for i in absent]
        listed += [f"{i.where}: no label" for i in missing]
        drive = re.compile(r"[A-Za-z]:[\\/]|\\\\")
        windows = any(drive.match(row[names["path"]]) for _, row in rows)
        see = "" if asked.names_files else " (`hsl-node data check` shows where each was looked for)"
        raise DataError(
            "\n".join(first_few(listed)),
            remedy=f"paths count from the table's own folder; mend these lines{see}"
            + "; those of a Windows drive lead nowhere here: leave out what stands before the folder" * windows,
        )
    left["empty rows"] = table.empty
    return Source(
        tuple(items),
        len(table.rows) + table.empty,
        +left,
        root=path.parent,
        taken=taken,
        doubts=table.doubts + (() if "split" in names or "split" in data.columns else _unused_split(table, data)),
        likely_patient="" if "patient" in names or "patient" in data.columns else find_likely("patient", table.header),
    )


def find_likely(key: str, header: Sequence[str]) -> str:
    """The column that tables usually call so, or ""."""
    folded = {_letters(column): column for column in reversed(header)}
    named = next((folded[word] for word in LIKELY[key] if word in folded), "")
    return named or next((folded[f] for f in folded if key == "patient" and ("patient" in f or "subject" in f)), "")


# ---------------------------------------------------------------- below


def _unused_split(table: Table, data: DataConfig) -> tuple[str, ...]:
    """A column that says nothing but train, validation and test, under another name than `split`."""
    for column in table.header:
        cells = {row[column].casefold() for _, row in table.rows} - {""}
        if len(cells) > 1 and cells <= SPLIT_WORDS.keys():
            line = NODE_TOML.columns({**data.columns, "split": column})
            return (f"column {column!r} gives a split that is not used: the node makes its own. To use it: {line}",)
    return ()


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name.casefold())


def _text(content: bytes) -> tuple[str, str]:
    """The text, and what to doubt of it. Raises: csv.Error: it is none."""
    if content.startswith(b"PK\x03\x04") or content.startswith(b"\xd0\xcf\x11\xe0"):
        raise csv.Error("it is a workbook or an archive, whatever its name")
    if content.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return content.decode("utf-32"), ""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16"), ""
    if b"\0" in content[:2]:  # UTF-16 without its mark: every other byte of a header is zero
        return content.decode("utf-16-be" if content[:1] == b"\0" else "utf-16-le"), ""
    try:
        return content.decode("utf-8-sig"), ""
    except UnicodeDecodeError:
        return content.decode("cp1252"), "is not in UTF-8 and was read as Windows-1252: see that its words look right"


def _delimiter(text: str) -> str:
    """The one by which most of the first rows are as wide as the header; of several the one that makes it widest."""

    def fits(delimiter: str) -> tuple[int, int]:
        rows = [row for row in islice(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), PROBED) if row]
        width = len(rows[0]) if rows else 0
        return sum(len(row) == width for row in rows) if width > 1 else 0, width

    return max(DELIMITERS, key=fits)


def _holds_rows(cell: str, delimiter: str, width: int) -> bool:
    return width > 1 and any(line.count(delimiter) >= width - 1 for line in cell.splitlines()[1:])


def _require_header(path: Path, rows: Sequence[tuple[int, list[str]]], header: Sequence[str]) -> None:
    """The first line names columns: it is not empty, and no title above a table."""
    widths = {len(row) for _, row in rows[:PROBED]}
    if not any(header) or (len(widths) == 1 and len(header) == 1 < min(widths)):
        what = "is empty" if not any(header) else "is one cell, the rows below it are more: a title?"
        raise DataError(
            f"{path.name}:1: the first line {what}",
            remedy="let the table begin with the names of its columns, e.g. path,label,patient",
        )


def _require_narrow(path: Path, rows: Sequence[tuple[int, list[str]]], header: Sequence[str]) -> None:
    """No row with a cell too many: its comma moved all behind it. Empty ones at the end of every row do no harm."""
    width = len(header)
    long = [(line, row) for line, row in rows if len(row) > width]
    if long and not (len(long) == len(rows) and not any(cell for _, row in long for cell in row[width:])):
        raise DataError(
            "\n".join(
                first_few(f"{path.name}:{line}: {len(row)} cells, the header has {len(header)}" for line, row in long)
            ),
            remedy="a cell that holds the separator wants quotes around it: mend these lines, or export the table anew",
        )


def _require_one_of_each(path: Path, header: Sequence[str], used: Collection[str]) -> None:
    twice = [name for name, count in Counter(header).items() if count > 1 and name in used]
    if twice:
        raise DataError(
            f"{path.name}:1: {len([c for c in header if c == twice[0]])} columns are called {twice[0]!r}",
            remedy="rename one of them in the table: which of them counts cannot be told",
        )


def _row_item(path: Path, line: int, row: Mapping[str, str], names: Mapping[str, str], asked: Asked) -> Item:
    where = f"{path.name}:{line}"
    cell = {key: row[column] for key, column in names.items()}
    split = cell.get("split", "")
    if split and split.casefold() not in SPLIT_WORDS:
        raise DataError(
            f"{where}: split {split!r} is neither train, validation nor test",
            remedy=f"mend that line, or set {asked.unsplit} to pass over that column",
        )
    return Item(
        where,
        cell["label"],
        find_file(path.parent, cell["path"]),
        patient=cell.get("patient") or None,
        site=cell.get("site") or None,
        split=SPLIT_WORDS[split.casefold()] if split else None,
    )


def find_file(folder: Path, name: str) -> Path:
    """The file as the table spells it, or as the disk does: written on Windows, accents in one letter or in two."""
    for spelt in _spellings(name):
        if os.path.isfile(folder / spelt):  # pathlib raises where a name is too long or a folder is closed
            return folder / spelt
    return folder / name


def _spellings(name: str) -> Iterator[str]:
    yield name
    for plain in (name, name.replace("\\", "/")):
        yield plain
        yield unicodedata.normalize("NFC", plain)
        yield unicodedata.normalize("NFD", plain)


def _column_names(path: Path, table: Table, data: DataConfig, asked: Asked) -> dict[str, str]:
    """Our word -> the table's column, for the columns in use."""
    header = table.header
    for key in data.columns:
        if key not in COLUMNS:
            name, near = data.columns[key], hint(key, COLUMNS)
            turned = name in COLUMNS and repr(name) not in near
            raise DataError(
                f"{key!r} is no column we know" + (f"; turn it round: {name}={key}" if turned else near),
                remedy=f"one of {', '.join(COLUMNS)}, in {asked.place}",
            )
    names = {key: data.columns.get(key, key) for key in COLUMNS}
    for key, column in names.items():
        if column not in header and (key in REQUIRED or (column and key in data.columns)):
            if any(cell and find_file(path.parent, cell).is_file() for cell in header):
                raise DataError(
                    f"{path.name}:1: a row with an image, but no header",
                    remedy="write the names of the columns above it, in their order, e.g. path,label,patient",
                )
            near = hint(column, header) if key in data.columns else ""  # to our own word the nearest may be any other
            raise DataError(
                f"{path.name}:1: no column {column!r} for the {key}{near}",
                remedy=f"columns here: {', '.join(header)}; {_naming(header, data, asked, key)}",
            )
    return {key: column for key, column in names.items() if column in header}


def _naming(header: Sequence[str], data: DataConfig, asked: Asked, wanted: str) -> str:
    """How to name the columns: those that look likely, `wanted` in any case."""
    missing = [k for k in LIKELY if k == wanted or (k not in data.columns and k not in header)]
    likely = {k: column for k in missing if (column := find_likely(k, header))}
    own = {**data.columns, **likely} if asked.is_toml else likely
    guess = f"; if these are the ones: {asked.columns(own)}" if wanted in likely else ""
    return f"name it with {asked.columns({wanted: '...'})}{guess}"


def _filtered(
    path: Path, table: Table, wanted: Mapping[str, str], private: Collection[str]
) -> tuple[list[tuple[int, dict[str, str]]], Counter[str], dict[str, dict[str, int]]]:
    """Rows whose cells are the wanted values; why the others are left out; which values were taken, how often.

    A value with * or ? that no cell is exactly is a pattern. No message quotes a `private` column.
    """
    rows, left, taken = list(table.rows), Counter[str](), dict[str, dict[str, int]]()
    for column, value in wanted.items():
        if column not in table.header:
            raise DataError(
                f"data.filter: {path.name} has no column {column!r}{hint(column, table.header)}",
                remedy=f"columns here: {', '.join(table.header)}",
            )
        cells = Counter(row[column] for _, row in rows)
        pattern = re.compile(fnmatch.translate(value)) if value not in cells and re.search(r"[*?]", value) else None
        values = {cell: count for cell, count in cells.items() if (pattern.match(cell) if pattern else cell == value)}
        if not values:
            known = [] if column in private else sorted(cells)
            begin = [cell for cell in known if cell.startswith(value)]
            quoted = ", ".join(first_few(repr(cell) for cell in (begin or known)))
            line = {column: begin[0]} if len(begin) == 1 else {column: f"{value}*"} if begin else {}
            copied = f"; {'all that begin so: ' * (len(begin) > 1)}filter = {toml_table(line)}" if line else ""
            raise DataError(
                f"data.filter: no row of {path.name} has {column} = {value!r}{hint(value, known)}",
                remedy=f"values there: {quoted}{copied}" if known else "correct it in node.toml",
            )
        kept = [entry for entry in rows if entry[1][column] in values]
        left[f"data.filter: another {column}"] += len(rows) - len(kept)
        rows, taken[column] = kept, {} if column in private else values
    return rows, left, taken
