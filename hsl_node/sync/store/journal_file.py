"""A journal's file: opened to write, to read, on a disk that is read only; and in words why it cannot be opened."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from hsl_node.errors import LocalStateError
from hsl_node.host import permissions
from hsl_node.host.units import size

OPEN_BYTES = 256 * 1024  # to open it takes 32 KiB for its index, and the tables the first time
MALFORMED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
NO_BACKUP = (
    "without a backup: stop the node, move its state directory away, make it anew with keys/, node.toml, "
    "federation.toml, keyring.toml, splits.json and the anchor set of the old one; then `hsl-node recover "
    "--from-peers`, `hsl-node start`"
)


def connected(database: Path | str, *, uri: bool = False) -> sqlite3.Connection:
    """For this thread alone."""
    db = sqlite3.connect(database, isolation_level=None, timeout=10, uri=uri)
    db.execute("PRAGMA synchronous = FULL")  # a commit is on the disk before the action that relies on it
    return db


def on_a_read_only_disk(path: Path, uri: str) -> sqlite3.Connection:
    """Readers of a write-ahead log write beside it: where that cannot be, the file as it is, or with its log a copy."""
    with suppress(sqlite3.OperationalError):  # it can where a daemon has it open, or left its index
        is_empty(db := connected(uri, uri=True))
        return db
    wal = path.with_name(f"{path.name}-wal")
    if not wal.exists() or not wal.stat().st_size:
        return connected(f"{uri}&immutable=1", uri=True)
    with TemporaryDirectory(prefix="hsl-node-") as folder:  # its names go at once, the open file stays readable
        for file in (path, wal):
            with open(file, "rb") as source, open(Path(folder, file.name), "wb") as copy:
                shutil.copyfileobj(source, copy)
        db = connected(Path(folder, path.name))
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = DELETE")
        is_empty(db)
    return db


def is_empty(db: sqlite3.Connection) -> bool:
    return db.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone() is None


def broken(path: Path, exc: sqlite3.Error) -> LocalStateError:
    """SQLite's words are the same for a full disk, somebody else's file and a broken one."""
    text, remedy = f"journal {path} cannot be opened: {exc}", "check disk and owner, or restore a backup"
    if code_of(exc) in MALFORMED:
        remedy += f"; {NO_BACKUP}"
    disk = os.statvfs(path.parent)
    if path.exists() and not os.access(path, os.R_OK | os.W_OK):
        return permissions.denied(path)
    elif disk.f_bavail * disk.f_frsize < OPEN_BYTES or (disk.f_files and not disk.f_favail):
        text += f"; its disk is full ({size(disk.f_bavail * disk.f_frsize)} free)"
        remedy = "free some space there first: the journal goes on as it is"
    return LocalStateError(text, remedy=remedy)


def code_of(exc: sqlite3.Error) -> int:
    """Malformed, where Python names no code: a text is no UTF-8, or `quick_check` found something."""
    return int(getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)) & 0xFF
