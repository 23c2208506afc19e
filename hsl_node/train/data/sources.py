"""Where images come from: a folder per class, a CSV table, or an .npz file -> a list of items, nothing decoded yet.

Messages name a table's line or a class folder, never an image's path or a patient: they may end up in a log.
"""

from __future__ import annotations

import csv
import difflib
import os
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hsl_node.errors import DataError, DataUnavailable
from hsl_node.federation.node_toml import DataConfig
from hsl_node.train.data.images import looks_like_image

Array = NDArray[Any]

TRAIN, VALIDATION, TEST = 0, 1, 2
SPLIT_NAMES = ("train", "validation", "test")
SPLIT_WORDS = {
    **{"train": TRAIN, "training": TRAIN, "trn": TRAIN},
    **{"val": VALIDATION, "valid": VALIDATION, "validation": VALIDATION, "dev": VALIDATION},
    **{"test": TEST, "testing": TEST, "tst": TEST},
}
COLUMNS = ("path", "label", "patient", "site", "split")
REQUIRED = ("path", "label")
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
    items: tuple[Item, ...]
    class_names: tuple[str, ...] | None = None  # .npz: what its numbers stand for, if it says so
    skipped: int = 0  # files of a folder that are no images
    path: Path = Path()  # the folder, the table or the .npz file
    root: Path = Path()  # what exclude's names are relative to
    unmatched: tuple[str, ...] = field(default=(), repr=False)  # names in exclude that no image has

    def name(self, item: Item) -> str:
        """The item's name for the operator's own terminal and for `exclude`. Never for a log."""
        if item.row:
            return f"{item.row[0]}[{item.row[1]}]"
        return item.path.relative_to(self.root).as_posix() if item.path.is_relative_to(self.root) else str(item.path)


@dataclass(frozen=True)
class Asked:
    """How the settings of a source are called where somebody made them: an error says what to change there."""

    path: str
    column: str  # {0}: our word for that column
    unsplit: str
    place: str


NODE_TOML = Asked(
    path="data.path",
    column='columns = {{ {0} = "..." }} under [data] in node.toml',
    unsplit='columns = { split = "" }',
    place="node.toml",
)
ANCHOR_BUILD = Asked(path="--data", column="--column {0}=...", unsplit="--column split=", place="the command line")


def read_source(data: DataConfig, asked: Asked = NODE_TOML) -> Source:
    """List the images of `data.path`, less those of `data.exclude`. `asked`: by whom, for the errors.

    Raises:
        DataError: nothing there, a table that lacks a column, a row that lacks a value, an unknown file type.
    """
    path = data.path
    if path is None:
        raise DataError("data.path is not set", remedy="name a folder, a table or an .npz file in node.toml")
    if not path.exists():
        raise _not_there(path, asked)
    if path.is_dir():
        source = _read_folder(path, data, asked)
    elif path.suffix.lower() in (".csv", ".tsv"):
        source = _read_table(path, data, asked)
    elif path.suffix.lower() == ".npz":
        source = _read_npz(path, data, asked)
    else:
        raise DataError(
            f"{asked.path} {path.name!r} is neither a folder nor .csv nor .npz",
            remedy=f"name one of these in {asked.place}",
        )
    names = [{source.name(item), item.path.name} for item in source.items]
    kept = tuple(item for item, own in zip(source.items, names, strict=True) if not own & set(data.exclude))
    unmatched = set(data.exclude).difference(*names)
    if not kept:
        raise DataError(f"{asked.path} {path} holds no images", remedy=_LAYOUTS)
    return replace(source, items=kept, unmatched=tuple(sorted(unmatched)), path=path)


def _not_there(path: Path, asked: Asked) -> DataError:
    fix = f"correct it in {asked.place}, or mount the disk"
    if path.is_symlink():
        return DataError(f"{asked.path} {path} is a link to {os.readlink(path)}, where nothing is", remedy=fix)
    return DataError(f"{asked.path} {path} does not exist", remedy=fix)


def labels_of(
    source: Source, classes: Sequence[str], mapping: Mapping[str, str], *, select: bool = False
) -> list[int | None]:
    """Index into `classes` per item; None where `mapping` says "" (leave this label out).

    `select`: other labels are left out too, instead of being an error (an anchor set picks two classes of many).

    Raises:
        DataError: labels that are no class, each with the first place it stands at and the nearest class.
    """
    index: list[int | None] = []
    unknown: dict[str, str] = {}
    for item in source.items:
        name = mapping.get(item.label, item.label)
        if name == "":
            index.append(None)
        elif name in classes:
            index.append(classes.index(name))
        elif item.row and source.class_names is None and item.label.isdecimal() and int(item.label) < len(classes):
            index.append(int(item.label))  # an .npz file without names: its numbers follow the plan's order
        else:
            unknown.setdefault(name, item.where)
            index.append(None)
    if unknown and not select:
        listed = (f"{where}: label {name!r} is no class{hint(name, classes)}" for name, where in unknown.items())
        raise DataError(
            "\n".join(first_few(listed)),
            remedy=f"classes of the plan: {', '.join(classes)} (no federation joined yet: name yours with "
            "`data check --classes A,B`); map other words with data.labels in node.toml,"
            f' e.g. labels = {{ "{next(iter(unknown))}" = "{classes[0]}" }}, or to "" to leave them out',
        )
    return index


def hint(name: str, known: Collection[str]) -> str:
    """`; did you mean 'x'?`, or nothing."""
    folded = {k.casefold(): k for k in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""


# ---------------------------------------------------------------- a folder per class

_LAYOUTS = "a folder per class with images in it (also inside train/, validation/, test/), a table, or an .npz file"


def _read_folder(root: Path, data: DataConfig, asked: Asked) -> Source:
    if data.columns or data.filter:
        raise DataError("columns and a filter belong to a table", remedy=f"point {asked.path} at the .csv file")
    folders = _folders(root)
    splits = {f: SPLIT_WORDS.get(f.name.casefold()) for f in folders}
    if folders and all(s is not None for s in splits.values()):
        classes = [(c, splits[f]) for f in folders for c in _folders(f)]
    else:
        classes = [(f, None) for f in folders]
    items: list[Item] = []
    skipped = 0
    for folder, split in classes:
        for path in sorted(folder.rglob("*")):
            if path.is_dir() or path.name.startswith("."):
                continue
            if looks_like_image(path):
                items.append(Item(f"folder {folder.name}", folder.name, path, split=split))
            else:
                skipped += 1
    return Source(tuple(items), skipped=skipped, root=root)


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


# ---------------------------------------------------------------- a table


Rows = list[tuple[int, dict[str, str]]]  # each with its line


def read_rows(path: Path) -> tuple[list[str], Rows]:
    """The header of a table, and its rows with their lines; cells stripped, empty rows left out.

    Raises:
        DataError: not a table, or not in UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            rows = csv.DictReader(file, delimiter=max(",;\t", key=header.count), strict=True, restval="")
            cells = [
                (rows.line_num, {k: v.strip() for k, v in row.items() if k is not None})
                for row in rows
                if any(row.values())
            ]
            return list(rows.fieldnames or ()), cells
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise DataError(f"{path.name}: cannot be read as a table: {exc}", remedy="save it as CSV in UTF-8") from exc


def _read_table(path: Path, data: DataConfig, asked: Asked) -> Source:
    header, table = read_rows(path)
    names = _column_names(path, header, data, asked)
    table = _filtered(path, table, data.filter, private={names[key] for key in ("path", "patient") if key in names})
    items = [_row_item(path, line, row, names, asked) for line, row in table]
    absent = [i.where for i in items if not i.path.is_file()]
    missing = [i.where for i in items if not i.label]
    if absent or missing:
        listed = [f"{w}: no such image file" for w in absent] + [f"{w}: no label" for w in missing]
        raise DataError(
            "\n".join(first_few(listed)), remedy="paths count from the table's own folder; mend these lines"
        )
    return Source(tuple(items), root=path.parent)


def _row_item(path: Path, line: int, row: Mapping[str, str], names: Mapping[str, str], asked: Asked) -> Item:
    where = f"{path.name}:{line}"
    cell = {key: row[column] for key, column in names.items()}
    image = path.parent / cell["path"]
    if "\\" in cell["path"] and not image.is_file():
        image = path.parent / cell["path"].replace("\\", "/")  # written on Windows
    split = cell.get("split", "")
    if split and split.casefold() not in SPLIT_WORDS:
        raise DataError(
            f"{where}: split {split!r} is neither train, validation nor test{hint(split, SPLIT_WORDS)}",
            remedy=f"mend that line, or set {asked.unsplit} to pass over that column",
        )
    return Item(
        where,
        cell["label"],
        image,
        patient=cell.get("patient") or None,
        site=cell.get("site") or None,
        split=SPLIT_WORDS[split.casefold()] if split else None,
    )


def _column_names(path: Path, header: list[str], data: DataConfig, asked: Asked) -> dict[str, str]:
    """Our word -> the table's column, for the columns in use."""
    for key in data.columns:
        if key not in COLUMNS:
            raise DataError(
                f"{key!r} is no column we know{hint(key, COLUMNS)}",
                remedy=f"one of {', '.join(COLUMNS)}, in {asked.place}",
            )
    names = {key: data.columns.get(key, key) for key in COLUMNS}
    for key, column in names.items():
        if column and column not in header and (key in REQUIRED or key in data.columns):
            raise DataError(
                f"{path.name}:1: no column {column!r} for the {key}{hint(column, header)}",
                remedy=f"columns here: {', '.join(header)}; name it with {asked.column.format(key)}",
            )
    return {key: column for key, column in names.items() if column in header}


def _filtered(path: Path, table: Rows, wanted: Mapping[str, str], private: Collection[str]) -> Rows:
    """Rows whose cells equal the wanted values; where no cell does, those that begin with its words.

    So "GE Logiq 7" also selects "GE Logiq 7 @10-14MHz", but never "GE Logiq 70". No message quotes a `private`
    column.
    """
    for column, value in wanted.items():
        if table and column not in table[0][1]:
            raise DataError(
                f"data.filter: {path.name} has no column {column!r}{hint(column, table[0][1])}",
                remedy=f"columns here: {', '.join(table[0][1])}",
            )
        cells = [row[column] for _, row in table]
        values = {value} if value in cells else {c for c in cells if c.startswith(value + " ")}
        if not values:
            known = [] if column in private else sorted(set(cells))
            raise DataError(
                f"data.filter: no row of {path.name} has {column} = {value!r}{hint(value, known)}",
                remedy=f"values there: {', '.join(first_few(known))}" if known else "correct it in node.toml",
            )
        table = [entry for entry, cell in zip(table, cells, strict=True) if cell in values]
    return table


# ---------------------------------------------------------------- .npz


def _read_npz(path: Path, data: DataConfig, asked: Asked) -> Source:
    """`images` + `labels`, or `train_images` + `train_labels` and the same for val and test. Pixels stay on disk."""
    if data.columns or data.filter:
        raise DataError("columns and a filter belong to a table", remedy=f"remove them from {asked.place}")
    try:
        with np.load(path, allow_pickle=False) as file:
            pairs = [(k, f"{k.removesuffix('images')}labels") for k in file.files if k.endswith("images")]
            pairs = [(images, labels) for images, labels in pairs if labels in file.files]
            labels = {images: np.asarray(file[name]) for images, name in pairs}
            names = tuple(str(n) for n in file["class_names"]) if "class_names" in file.files else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as exc:
        raise DataError(
            f"{path.name}: cannot be read as .npz without pickled objects: {exc}", remedy="save it anew"
        ) from exc
    if not pairs:
        raise DataError(
            f"{path.name}: no arrays images and labels", remedy="also train_images, train_labels, val_..., test_..."
        )
    items: list[Item] = []
    for images, values in labels.items():
        values = values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values
        if values.ndim != 1 or values.dtype.kind not in "iuUb":
            raise DataError(f"{path.name}: labels of {images} are not one number or word per image", remedy="mend them")
        split = SPLIT_WORDS.get(images.removesuffix("images").strip("_").casefold())
        for n, value in enumerate(values.tolist()):
            word = str(int(value)) if values.dtype.kind != "U" else value
            if names is not None and word.isdecimal() and int(word) < len(names):
                word = names[int(word)]
            items.append(Item(f"{path.name} {images}[{n}]", word, path, (images, n), split=split))
    return Source(tuple(items), names, root=path.parent)


def npz_array(path: Path, name: str) -> Array:
    """One array of an .npz file: read once to digest its images, and once more to decode them.

    Raises:
        DataUnavailable: it could be read a moment ago.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            array: Array = file[name]
    except OSError as exc:
        raise DataUnavailable(
            f"{path.name} cannot be read: {exc.strerror}",
            remedy="see that its share, or its disk, is sound and mounted",
        ) from exc
    return array


def first_few(lines: Iterable[str]) -> list[str]:
    """The first few, and how many more."""
    every = list(lines)
    return every[:NAMED_MAX] + ([f"... and {len(every) - NAMED_MAX} more"] if len(every) > NAMED_MAX else [])
