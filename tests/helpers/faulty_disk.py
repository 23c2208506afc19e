"""Disks that fail or forget, in place of `durable.disk`.

FaultyDisk   full, or in error, at the n-th call of one operation; or it writes a part of what it is given
Recorder     notes every operation, and can say what a disk may hold after a power loss at any of them

What a disk may hold: of a file, what was there at its last fsync, and any of the writes since; of a folder, the names
at its last fsync, and any of the changes since. A rename is one change: both names of it, or none.
"""

from __future__ import annotations

import errno
import io
import itertools
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from hsl_node.host.durable import Disk


class _Watched(io.FileIO):
    """A file whose every write is announced, and may be cut short or refused."""

    def __init__(self, descriptor: int, write: Callable[[int, int, bytes], int]) -> None:
        super().__init__(descriptor, "r+b")
        self._write = write

    def write(self, data: Any) -> int:
        allowed = self._write(self.fileno(), self.tell(), bytes(data))
        return super().write(memoryview(bytes(data))[:allowed])


def buffered(raw: _Watched) -> BinaryIO:
    return cast(BinaryIO, io.BufferedRandom(raw, buffer_size=4096))


@dataclass
class FaultyDisk(Disk):
    """`code` at the n-th call (from 1) of `operation`: open, write, fsync, rename, link, unlink, mkdir."""

    operation: str
    nth: int
    code: int = errno.ENOSPC
    most: int = 2**30  # bytes that one write takes
    calls: int = 0
    fired: bool = False

    def _called(self, operation: str) -> None:
        if operation == self.operation:
            self.calls += 1
            if self.calls == self.nth:
                self.fired = True
                raise OSError(self.code, os.strerror(self.code))

    def open(self, path: Path | str, flags: int, mode: int = 0o777, *, folder: int | None = None) -> int:
        self._called("open")
        return super().open(path, flags, mode, folder=folder)

    def file(self, descriptor: int) -> BinaryIO:
        return buffered(_Watched(descriptor, self._write))

    def _write(self, descriptor: int, offset: int, data: bytes) -> int:
        self._called("write")
        return min(len(data), self.most)

    def fsync(self, descriptor: int) -> None:
        self._called("fsync")
        super().fsync(descriptor)

    def rename(self, old: Path | str, new: Path | str, **folders: int | None) -> None:
        self._called("rename")
        super().rename(old, new, **folders)

    def link(self, old: Path | str, new: Path | str) -> None:
        self._called("link")
        super().link(old, new)

    def unlink(self, path: Path | str, *, folder: int | None = None) -> None:
        self._called("unlink")
        super().unlink(path, folder=folder)

    def mkdir(self, path: Path, mode: int) -> None:
        self._called("mkdir")
        super().mkdir(path, mode)


# ------------------------------------------------------------------ power loss


@dataclass(frozen=True)
class Write:
    inode: int
    offset: int
    data: bytes


@dataclass(frozen=True)
class Name:
    """A change of names: (folder's inode, name, inode that it then stands for or None)."""

    entries: tuple[tuple[int, str, int | None], ...]


@dataclass(frozen=True)
class Fsync:
    inode: int


@dataclass(frozen=True)
class Mark:
    """Something was promised to somebody here."""

    text: str


Operation = Write | Name | Fsync | Mark


@dataclass
class Recorder(Disk):
    """The real file system below `root`, with a log. What lies there at the beginning is durable."""

    root: Path
    log: list[Operation] = field(default_factory=list)
    files: dict[int, bytes] = field(default_factory=dict)  # inode -> content at the beginning
    folders: dict[int, dict[str, int]] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)  # descriptors that keep inode numbers from being used again

    def __post_init__(self) -> None:
        for where, folders, files in os.walk(self.root):
            inode = self._seen(where)
            self.folders[inode] = {n: self._seen(os.path.join(where, n)) for n in folders + files}
            for name in files:
                self.files[self.folders[inode][name]] = Path(where, name).read_bytes()
        self.top = os.stat(self.root).st_ino

    def close(self) -> None:
        for descriptor in self.kept:
            os.close(descriptor)

    def mark(self, text: str) -> None:
        self.log.append(Mark(text))

    def _seen(self, path: Path | str, folder: int | None = None) -> int:
        descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW, dir_fd=folder)
        self.kept.append(descriptor)
        return os.fstat(descriptor).st_ino

    def _place(self, path: Path | str, folder: int | None) -> tuple[int, str]:
        where, name = os.path.split(path)
        if folder is not None and not where:
            return os.fstat(folder).st_ino, name
        return os.stat(where or ".").st_ino, name

    def open(self, path: Path | str, flags: int, mode: int = 0o777, *, folder: int | None = None) -> int:
        descriptor = super().open(path, flags, mode, folder=folder)
        if flags & os.O_CREAT:
            self.log.append(Name(((*self._place(path, folder), self._seen(path, folder)),)))
        return descriptor

    def file(self, descriptor: int) -> BinaryIO:
        return buffered(_Watched(descriptor, self._write))

    def _write(self, descriptor: int, offset: int, data: bytes) -> int:
        self.log.append(Write(os.fstat(descriptor).st_ino, offset, data))
        return len(data)

    def fsync(self, descriptor: int) -> None:
        self.log.append(Fsync(os.fstat(descriptor).st_ino))

    def rename(
        self, old: Path | str, new: Path | str, *, old_folder: int | None = None, new_folder: int | None = None
    ) -> None:
        inode = self._seen(old, old_folder)
        super().rename(old, new, old_folder=old_folder, new_folder=new_folder)
        gone, come = self._place(old, old_folder), self._place(new, new_folder)
        self.log.append(Name(((*gone, None), (*come, inode))))

    def link(self, old: Path | str, new: Path | str) -> None:
        super().link(old, new)
        self.log.append(Name(((*self._place(new, None), self._seen(new)),)))

    def unlink(self, path: Path | str, *, folder: int | None = None) -> None:
        super().unlink(path, folder=folder)
        self.log.append(Name(((*self._place(path, folder), None),)))

    def mkdir(self, path: Path, mode: int) -> None:
        super().mkdir(path, mode)
        inode = self._seen(path)
        self.folders[inode] = {}
        self.log.append(Name(((*self._place(path, None), inode),)))

    # -------------------------------------------------------------- after the power came back

    def after_power_loss(self, into: Path, samples: int = 6, seed: int = 0) -> Iterator[tuple[Path, frozenset[str]]]:
        """Every cut of the log, with several choices of what had reached the disk: (folder, marks passed before)."""
        number = itertools.count()
        rng = random.Random(seed)
        for cut in range(len(self.log) + 1):
            done = self.log[:cut]
            marks = frozenset(o.text for o in done if isinstance(o, Mark))
            loose = [i for i, o in enumerate(done) if isinstance(o, Write | Name) and not self._synced(done, i)]
            names = {i for i in loose if isinstance(done[i], Name)}
            choices: list[set[int]] = [set(), set(loose), names, set(loose) - names]
            choices += [{i for i in loose if rng.random() < 0.5} for _ in range(samples if len(loose) > 1 else 0)]
            for reached in {frozenset(c) for c in choices}:
                lost = set(loose) - reached
                target = into / str(next(number))
                self._build([o for i, o in enumerate(done) if i not in lost], target)
                yield target, marks

    @staticmethod
    def _synced(done: list[Operation], index: int) -> bool:
        operation = done[index]
        later = {o.inode for o in done[index:] if isinstance(o, Fsync)}
        if isinstance(operation, Write):
            return operation.inode in later
        assert isinstance(operation, Name)
        return any(folder in later for folder, _, _ in operation.entries)

    def _build(self, operations: list[Operation], target: Path) -> None:
        files = {inode: bytearray(content) for inode, content in self.files.items()}
        folders = {inode: dict(names) for inode, names in self.folders.items()}
        for operation in operations:
            if isinstance(operation, Write):
                content = files.setdefault(operation.inode, bytearray())
                content.extend(bytes(max(0, operation.offset + len(operation.data) - len(content))))
                content[operation.offset : operation.offset + len(operation.data)] = operation.data
            elif isinstance(operation, Name):
                for folder, name, inode in operation.entries:
                    entries = folders.setdefault(folder, {})
                    if inode is None:
                        entries.pop(name, None)
                    else:
                        entries[name] = inode
        self._fill(target, self.top, files, folders)

    def _fill(self, path: Path, inode: int, files: dict[int, bytearray], folders: dict[int, dict[str, int]]) -> None:
        path.mkdir(parents=True)
        for name, below in folders.get(inode, {}).items():
            if below in self.folders:
                self._fill(path / name, below, files, folders)
            else:
                (path / name).write_bytes(files.get(below, b""))
