"""The disks of a simulated federation: each may be full, fail at a call, or forget at a power cut what was not synced.

A power cut takes back the last few changes that no fsync has made durable, newest first, as a journalling file system
does; of a file that was not synced an end is missing. SQLite syncs every commit and keeps what it has.
"""

from __future__ import annotations

import errno
import os
import random
import sqlite3
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from faulty_disk import _Watched, buffered
from virtual_time import OWNER, Killed

from hsl_node.host.durable import Disk
from hsl_node.sync.inbox.part import Part
from hsl_node.sync.store.journal import Journal

GROWS = ("open", "write", "mkdir", "link")  # what a full disk refuses


@dataclass
class Loose:
    """A change that a power cut may take back: until one of these inodes is synced."""

    inodes: frozenset[int]
    take_back: Callable[[], None]
    keeps: int = -1  # a descriptor


@dataclass
class SiteDisk:
    root: Path  # of what was removed
    forgetful: bool = False  # an fsync does nothing
    full: bool = False
    fails: tuple[str, int, int] | None = None  # (operation, calls until then, code): once
    fired: int = 0
    loose: list[Loose] = field(default_factory=list)
    trash: int = 0

    def called(self, operation: str) -> None:
        if self.full and operation in GROWS:
            self.fired += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.fails and self.fails[0] == operation:
            _, left, code = self.fails
            self.fails = (operation, left - 1, code) if left > 1 else None
            if left <= 1:
                self.fired += 1
                raise OSError(code, os.strerror(code))

    def changed(self, *inodes: int, take_back: Callable[[], None], keeps: int = -1) -> None:
        self.loose.append(Loose(frozenset(inodes), take_back, keeps))

    def synced(self, descriptor: int) -> None:
        if self.forgetful:
            return
        inode, kept = os.fstat(descriptor).st_ino, []
        for change in self.loose:
            if inode not in change.inodes:
                kept.append(change)
            elif change.keeps >= 0:
                os.close(change.keeps)
        self.loose = kept

    def written(self, descriptor: int, rng: random.Random) -> None:
        """A file holds what was not synced yet."""
        inode = os.fstat(descriptor).st_ino
        if any(change.inodes == {inode} for change in self.loose):
            return
        own, share = os.dup(descriptor), rng.random()
        self.changed(inode, take_back=lambda: os.ftruncate(own, int(os.fstat(own).st_size * share)), keeps=own)

    def bin(self) -> Path:
        self.trash += 1
        self.root.mkdir(exist_ok=True)
        return self.root / str(self.trash)

    def power_cut(self, rng: random.Random) -> int:
        """Gives back how many changes were lost."""
        lost = rng.randint(0, len(self.loose))
        for change in reversed(self.loose[len(self.loose) - lost :]):
            with suppress(FileNotFoundError, OSError):
                change.take_back()
        self.close()
        return lost

    def close(self) -> None:
        for change in self.loose:
            if change.keeps >= 0:
                os.close(change.keeps)
        self.loose = []


def mine() -> Any:
    """The disk of the site that runs now; None outside of the simulation. Raises: Killed: it does not run any more."""
    life: Any = OWNER.get()
    if life is None:
        return None
    if life.dead:
        raise Killed
    return life.site.disk


class SimulatedDisk(Disk):
    """In place of `durable.disk`: every call meets the disk of whoever makes it."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def open(self, path: Path | str, flags: int, mode: int = 0o777, *, folder: int | None = None) -> int:
        site = mine()
        if site and flags & os.O_CREAT:
            site.called("open")
        new = site is not None and bool(flags & os.O_CREAT) and not (where := _absolute(path, folder)).exists()
        descriptor = super().open(path, flags, mode, folder=folder)
        if site and new:
            site.changed(_inode(where.parent), take_back=lambda: os.unlink(where))
        return descriptor

    def file(self, descriptor: int) -> BinaryIO:
        site = mine()
        if site is None:
            return super().file(descriptor)

        def write(fd: int, offset: int, data: bytes) -> int:
            if (disk := mine()) is not None:
                disk.called("write")
                disk.written(fd, self._rng)
            return len(data)

        return buffered(_Watched(descriptor, write))

    def fsync(self, descriptor: int) -> None:
        site = mine()
        if site:
            site.called("fsync")
            site.synced(descriptor)

    def rename(
        self, old: Path | str, new: Path | str, *, old_folder: int | None = None, new_folder: int | None = None
    ) -> None:
        site = mine()
        if site is None:
            return super().rename(old, new, old_folder=old_folder, new_folder=new_folder)
        site.called("rename")
        gone, come = _absolute(old, old_folder), _absolute(new, new_folder)
        kept = site.bin() if come.exists() else None
        if kept:
            os.link(come, kept)
        os.rename(gone, come)

        def take_back() -> None:
            os.rename(come, gone)
            if kept:
                os.rename(kept, come)

        site.changed(_inode(gone.parent), _inode(come.parent), take_back=take_back)

    def link(self, old: Path | str, new: Path | str) -> None:
        if site := mine():
            site.called("link")
        super().link(old, new)

    def unlink(self, path: Path | str, *, folder: int | None = None) -> None:
        site = mine()
        if site is None:
            return super().unlink(path, folder=folder)
        site.called("unlink")
        where, kept = _absolute(path, folder), site.bin()
        os.rename(where, kept)
        site.changed(_inode(where.parent), take_back=lambda: os.rename(kept, where))

    def mkdir(self, path: Path, mode: int) -> None:
        site = mine()
        if site:
            site.called("mkdir")
        super().mkdir(path, mode)
        if site:
            site.changed(_inode(path.parent), take_back=lambda: os.rmdir(path))


def watch_parts(rng: random.Random) -> Callable[[Part, int, int, bytes], None]:
    """In place of `Part.write`, which writes what arrives past `durable.disk`."""
    write = Part.write

    def watched(part: Part, descriptor: int, offset: int, data: bytes) -> None:
        if site := mine():
            site.called("write")
            site.written(descriptor, rng)
        write(part, descriptor, offset, data)

    return watched


class FailingJournal:
    """In place of a journal's connection: its `left`-th commit from now meets an input/output error, done or not."""

    def __init__(self, journal: Journal, disk: SiteDisk, left: int, done: bool) -> None:
        self._db, self._disk, self._left, self._done = journal._db, disk, left, done
        journal._db = self  # type: ignore[assignment]

    def execute(self, query: str, *values: Any) -> Any:
        if query == "COMMIT":
            self._left -= 1
            if self._left == 0:
                self._disk.fired += 1
                if self._done:
                    self._db.execute(query)
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = sqlite3.SQLITE_IOERR
                raise error
        return self._db.execute(query, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


def _absolute(path: Path | str, folder: int | None) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{folder}"), path) if folder is not None else Path(path).absolute()


def _inode(path: Path) -> int:
    return os.stat(path).st_ino
