"""Every step that must survive a power loss or kill -9, with the points at which a test kills the process. No torch.

    with replacing(path, Step.FUSION_WRITE) as file:      temporary file, fsync, rename, fsync of the folder
        file.write(...)

Nothing else in the package calls fsync, rename or link (`tests/host/test_durable.py`). A failed fsync is never tried
again: the kernel may have dropped the bytes already. `DiskFailed` ends the process; the journal makes the restart safe.

A process killed between the rename and the fsync of the folder leaves a file that its successor finds and that a power
loss still takes away: whoever takes a file as it lies, instead of writing it, calls `accept`.

Crash points: each `Step` has `NAME:before` and `NAME:after`; a written file also `NAME:renaming`, between fsync and
rename, and `NAME:renamed`, between rename and the folder's fsync; a moved one the latter. With
HSL_CRASH_AT="NAME:before#2 /some/mark" in the environment when this module is loaded, the process kills itself at the
second passage and leaves its id in the file `mark`; where that exists already nothing happens.
"""

from __future__ import annotations

import errno
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, cast

from hsl_node.errors import DiskFailed, LocalStateError

RESTARTED = "the node goes on from its journal after a restart"
MOVES = ("before", "renamed", "after")
WRITES = ("before", "renaming", "renamed", "after")


class Step(Enum):
    """All durable steps: name, and where it can be killed. Who takes which: `tests/host/test_durable.py` finds it."""

    START_INITIAL = "start.initial", WRITES
    START_JOURNAL = ("start.journal",)
    START_STATE = ("start.state",)

    TRAINER_DIGESTS = "trainer.digests", WRITES
    TRAINER_LEDGER = "trainer.ledger", WRITES
    TRAINER_IMAGES = "trainer.images", WRITES
    TRAINER_BEST = "trainer.best", WRITES
    TRAINER_OWN = "trainer.own", WRITES  # all tensors of the epoch that is sent
    TRAINER_EPOCH = "trainer.epoch", WRITES
    TRAINER_OUTBOX = "trainer.outbox", WRITES

    SENDER_SIGN = ("sender.sign",)  # the promise: nothing is published before
    SENDER_DELIVERED = ("sender.delivered",)

    RECEIVER_PART = ("receiver.part",)
    RECEIVER_COMMIT = ("receiver.commit",)
    RECEIVER_CLAIM = ("receiver.claim",)
    RECEIVER_VERIFIED = ("receiver.verified",)
    RECEIVER_ADMIT = "receiver.admit", MOVES
    RECEIVER_RECORD = ("receiver.record",)
    RECEIVER_RECEIPT = "receiver.receipt", WRITES
    RECEIVER_RELEASE = ("receiver.release",)
    RECEIVER_REFUSED = "receiver.refused", WRITES
    RECEIVER_EVIDENCE = "receiver.evidence", WRITES

    FUSION_WRITE = "fusion.write", WRITES
    FUSION_RECORD = ("fusion.record",)
    FUSION_PRUNE = ("fusion.prune",)

    JOURNAL_NOTE = ("journal.note",)  # whatever else the journal keeps

    INIT_KEY = "init.key", WRITES
    INIT_CARD = "init.card", WRITES
    INIT_SETTINGS = "init.settings", WRITES
    JOIN_SET_ASIDE = ("join.set-aside",)
    JOIN_ANCHOR = "join.anchor", WRITES
    JOIN_FEDERATION = "join.federation", WRITES

    KEYS_RING = "keys.ring", WRITES
    KEYS_SWITCH = ("keys.switch",)  # the new private key takes the old one's place

    RECOVERY_FETCH = "recovery.fetch", MOVES
    RECOVERY_PLACE = "recovery.place", WRITES
    RECOVERY_STATE = ("recovery.state",)

    BACKUP_WRITE = "backup.write", WRITES
    RESTORE_UNPACK = "restore.unpack", WRITES
    RESTORE_PLACE = ("restore.place",)

    FILE_WEIGHTS = "file.weights", WRITES  # anchor set, exported model
    FILE_RESULT = "file.result", WRITES  # for people: reports, predictions, cards

    def __init__(self, label: str, where: tuple[str, ...] = ("before", "after")) -> None:
        self.label = label
        self.points = tuple(f"{label}:{w}" for w in where)


POINTS = tuple(point for step in Step for point in step.points)


class Disk:
    """What the operating system does for us; a test puts one in its place that fails or forgets."""

    def open(self, path: Path | str, flags: int, mode: int = 0o777, *, folder: int | None = None) -> int:
        return os.open(path, flags | os.O_CLOEXEC, mode, dir_fd=folder)

    def file(self, descriptor: int) -> BinaryIO:
        return cast(BinaryIO, os.fdopen(descriptor, "w+b"))

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def rename(
        self, old: Path | str, new: Path | str, *, old_folder: int | None = None, new_folder: int | None = None
    ) -> None:
        os.rename(old, new, src_dir_fd=old_folder, dst_dir_fd=new_folder)

    def link(self, old: Path | str, new: Path | str) -> None:
        os.link(old, new)

    def unlink(self, path: Path | str, *, folder: int | None = None) -> None:
        os.unlink(path, dir_fd=folder)

    def mkdir(self, path: Path, mode: int) -> None:
        os.mkdir(path, mode)


disk = Disk()
on_failure: Callable[[LocalStateError], object] = lambda error: None  # noqa: E731  (the daemon's way out, from any thread)


# ---------------------------------------------------------------- files


@contextmanager
def replacing(
    path: Path | str,
    step: Step,
    *,
    mode: int = 0o666,
    folder: int | None = None,
    by_way_of: int | None = None,
    shared: bool = False,
    once: bool = False,
) -> Iterator[BinaryIO]:
    """Write a file that takes the place of `path` when the block ends without error, whole and durably.

    `folder`: descriptor of the folder that `path` is a name in. `by_way_of`: of the one that holds the temporary file,
    where others clear `folder` of names they don't know. `shared`: other processes may write the same file at the same
    time. `once`: never over another file. After an error nothing of it is left; after a kill a temporary file, which
    the next attempt replaces (`shared`: which stays).

    Raises:
        OSError: the disk is full, the folder is not ours; with `once` FileExistsError. What the block raises, too.
        DiskFailed: an fsync failed, or this disk gave an input/output error.
    """
    where, name = os.path.split(path)
    temporary = os.path.join(where, f".{name}.{secrets.token_hex(8)}.tmp" if shared else f"{name}.tmp")
    beside = folder if by_way_of is None else by_way_of
    what = f"{name} could not be written"
    with passing(step):
        with _failing(what):
            if not shared:
                with suppress(FileNotFoundError):
                    disk.unlink(temporary, folder=beside)
            descriptor = disk.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, folder=beside)
        try:
            with closing(cast(BinaryIO, _Ours(disk.file(descriptor), what))) as file:
                yield file
                file.flush()
                sync(file.fileno(), name)
            _reached(step, "renaming")
            with _failing(what):
                if once:
                    disk.link(temporary, path)
                    with suppress(OSError):
                        disk.unlink(temporary, folder=beside)
                else:
                    disk.rename(temporary, path, old_folder=beside, new_folder=folder)
            temporary = ""
        finally:
            if temporary:
                with suppress(OSError):
                    disk.unlink(temporary, folder=beside)
        renamed(step)
        with _failing(what):
            sync_folder(folder if folder is not None else Path(where or "."))


class _Ours:
    """The file that `replacing` gives. Its errors are this disk's; what else the block reads may lie anywhere."""

    def __init__(self, file: BinaryIO, what: str) -> None:
        self._file, self._what = file, what

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._file, name)
        return _failing(self._what)(method) if callable(method) else method


def accept(path: Path) -> None:
    """Take a file that lies there already: from here on it is as durable as one written by `replacing`.

    Its bytes, its name, and the name of its folder, which may have been made for it. Are they the right bytes? That is
    the caller's question.

    Raises:
        FileNotFoundError
        DiskFailed: an fsync failed.
    """
    descriptor = disk.open(path, os.O_RDONLY)
    try:
        sync(descriptor, path.name)
    finally:
        os.close(descriptor)
    folder = path.absolute().parent
    sync_folder(folder)
    with suppress(PermissionError):  # above the state directory: not of our making
        sync_folder(folder.parent)


def write(path: Path | str, content: bytes, step: Step, *, mode: int = 0o666) -> None:
    """See `replacing`."""
    with replacing(path, step, mode=mode) as file:
        file.write(content)


def sync(descriptor: int, what: str) -> None:
    """Make a file's bytes durable.

    Raises:
        DiskFailed
    """
    try:
        disk.fsync(descriptor)
    except OSError as exc:
        raise disk_failed(f"{what} could not be made durable: {exc}") from exc


def sync_folder(folder: Path | int) -> None:
    """Make the names in a folder durable: what was renamed, made or removed there.

    Raises:
        DiskFailed
    """
    descriptor = disk.open(folder, os.O_RDONLY | os.O_DIRECTORY) if isinstance(folder, Path) else folder
    try:
        disk.fsync(descriptor)
    except OSError as exc:
        if exc.errno != errno.EINVAL:  # a file system that keeps no folders in this sense has nothing to fail
            raise disk_failed(f"fsync of the folder {folder} failed: {exc}") from exc
    finally:
        if isinstance(folder, Path):
            os.close(descriptor)


def rename(old: Path | str, new: Path | str, *, old_folder: int | None = None, new_folder: int | None = None) -> None:
    """Atomic; durable after a `sync_folder` of both folders. Raises: OSError, DiskFailed."""
    with _failing(f"{os.path.basename(new)} could not be moved into place"):
        disk.rename(old, new, old_folder=old_folder, new_folder=new_folder)


def renamed(step: Step) -> None:
    """The rename of this step is done and its folder not synced yet: a test may kill the process here too."""
    _reached(step, "renamed")


def make_folder(path: Path) -> None:
    """A private folder, where there is none; durable after a `sync_folder` of its parent."""
    with suppress(FileExistsError):
        disk.mkdir(path, 0o700)


def disk_failed(message: str, remedy: str = "check the disk; " + RESTARTED) -> DiskFailed:
    """The error to raise. Whatever becomes of it: the process has been told."""
    error = DiskFailed(message, remedy=remedy)
    on_failure(error)
    return error


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """A full disk may have room again; one that answers with an input/output error is at its end."""
    try:
        yield
    except OSError as exc:
        if exc.errno not in (errno.EIO, errno.EROFS):
            raise
        if exc.errno == errno.EROFS:
            raise disk_failed(
                f"{what}: its file system is mounted read-only", "`dmesg` says why; " + RESTARTED
            ) from exc
        raise disk_failed(f"{what}: {exc}") from exc


# ---------------------------------------------------------------- crash points


@contextmanager
def passing(step: Step) -> Iterator[None]:
    """The block is this durable step: a test may kill the process before and after it."""
    _reached(step, "before")
    yield
    _reached(step, "after")


def _reached(step: Step, where: str) -> None:
    if _crash is not None and _crash.point == f"{step.label}:{where}":
        _crash.passed()


@dataclass
class _Crash:
    """Where this process is to die."""

    point: str
    left: int  # passages until then
    mark: str

    def passed(self) -> None:
        self.left -= 1
        if self.left:
            return
        try:
            mark = os.open(self.mark, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return
        os.write(mark, str(os.getpid()).encode())
        os.kill(os.getpid(), signal.SIGKILL)


def _planned(text: str) -> _Crash | None:
    """What HSL_CRASH_AT asks for. Raises: ValueError: no such point."""
    if not text:
        return None
    where, _, mark = text.partition(" ")
    point, _, count = where.partition("#")
    if point not in POINTS or not mark:
        raise ValueError(f"HSL_CRASH_AT={text!r}: not `POINT#COUNT FILE` with a point of {', '.join(POINTS)}")
    return _Crash(point, int(count or 1), mark)


_crash = _planned(os.environ.get("HSL_CRASH_AT", ""))
