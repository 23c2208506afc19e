"""List the images of `data.path`: a folder, a table or an .npz file -> a `Source`, nothing decoded yet."""

from __future__ import annotations

import fnmatch
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hsl_node.errors import DataError
from hsl_node.federation.node_toml import DataConfig
from hsl_node.train.data.arrays import read_npz
from hsl_node.train.data.folders import BESIDE, read_folder
from hsl_node.train.data.images import looks_like_image
from hsl_node.train.data.sources import NODE_TOML, Asked, Source, first_few
from hsl_node.train.data.tables import is_table, read_table

LAYOUTS = "a folder per class with images in it (also inside train/, validation/, test/), a table, or an .npz file"


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
    if path.is_file() and is_table(path):
        source = read_table(path, data, asked)
    elif data.filter or data.columns not in ({}, {"split": ""}):
        raise DataError(
            f"columns and a filter belong to a table, and {asked.path} is none",
            remedy=f"point {asked.path} at the .csv file, or take them out of {asked.place}; but for"
            f" {asked.unsplit}, which passes over the split that a folder or an .npz file gives",
        )
    elif path.is_dir():
        source = read_folder(path, data)
    elif path.suffix.lower() == ".npz":
        source = read_npz(path, data)
    else:
        raise DataError(
            f"{asked.path} {path.name!r} is neither a folder nor .csv nor .npz",
            remedy=f"name one of these in {asked.place}",
        )
    source = _less_excluded(source, data.exclude)
    if not source.items:
        why = "".join(f"; {count} {source.unit}: {reason}" for reason, count in source.left.items())
        there = (
            sorted(p.name for p in path.iterdir() if p.suffix.lower() in (".csv", ".tsv", ".npz"))
            if path.is_dir()
            else []
        )
        if path.is_dir() and not there and source.left.get(BESIDE) and any(map(looks_like_image, path.iterdir())):
            raise DataError(
                f"{asked.path} {path}: its images lie in no folder that names their class",
                remedy="if it is that of one class, write the folder above it; else make a folder per class in it",
            )
        name = f"write {asked.path} with /{' or /'.join(first_few(there))} at its end; else " if there else ""
        raise DataError(f"{asked.path} {path} holds no images{why}", remedy=f"{name}{LAYOUTS}")
    return replace(source, path=path)


def _not_there(path: Path, asked: Asked) -> DataError:
    fix = f"correct it in {asked.place}, or mount the disk"
    if path.is_symlink():
        return DataError(f"{asked.path} {path} is a link to {os.readlink(path)}, where nothing is", remedy=fix)
    return DataError(f"{asked.path} {path} does not exist", remedy=fix)


def _less_excluded(source: Source, exclude: Sequence[str]) -> Source:
    """Without the items that an entry of data.exclude names: by name or base name, or by a pattern of * ? []."""
    plain = {_composed(entry): entry for entry in exclude}
    patterns = {e: re.compile(fnmatch.translate(_composed(e))) for e in exclude if re.search(r"[*?\[]", e)}
    left: Counter[str] = Counter()
    kept = []
    for item in source.items:
        names = [_composed(source.name(item)), _composed(item.path.name)]
        entry = next((plain[name] for name in names if name in plain), None)
        if entry is None:
            entry = next((e for e, p in patterns.items() if any(p.match(name) for name in names)), None)
        if entry is None:
            kept.append(item)
        else:
            left[entry] += 1
    return replace(
        source,
        items=tuple(kept),
        left=Counter(source.left) + Counter({"named in data.exclude": left.total()}),
        excluded=left,
        unmatched=tuple(sorted(set(exclude) - left.keys())),
    )


def _composed(name: str) -> str:
    """One form for a name with accents: disks and tables differ in it."""
    return unicodedata.normalize("NFC", name)
