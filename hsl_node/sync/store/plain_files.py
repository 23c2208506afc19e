"""Files in folders that somebody else writes to: no link is followed, no FIFO waited for, no folder left."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hsl_node.errors import PeerDataError
from hsl_node.federation.names import Peer

RENAME_MAX_S = 60.0
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PLAIN = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@contextmanager
def open_folder(homes: Path, peer: Peer, folder: str) -> Iterator[int]:
    """A descriptor of one folder of a home. No component below `homes` may be a link."""
    home = os.open(homes / peer, _DIRECTORY)
    try:
        descriptor = os.open(folder, _DIRECTORY, dir_fd=home)
    finally:
        os.close(home)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_plain(name: str, flags: int, folder: int) -> int:
    """Open a regular file that has one name only, without following a link or waiting on a FIFO.

    Raises:
        PeerDataError: code `file`; a link, FIFO, socket, device, directory, a second name, or unreadable.
        OSError: as `os.open`.
    """
    try:
        descriptor = os.open(name, flags | _PLAIN, 0o600, dir_fd=folder)
    except OSError as exc:
        # EACCES: on another server's inbox a sender may have made its file unreadable for us
        if exc.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENODEV, errno.EACCES):
            raise PeerDataError("not a plain file", code="file") from exc
        raise
    try:
        require_plain(os.fstat(descriptor))
    except PeerDataError:
        os.close(descriptor)
        raise
    return descriptor


def require_plain(status: os.stat_result) -> None:
    """Raises: PeerDataError: code `file`."""
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
        raise PeerDataError("not a plain file with a single name", code="file")


def is_in_motion(status: os.stat_result) -> bool:
    """Is this file being renamed by another server? OpenSSH's makes the new name first, then removes the old one.

    A second name that stays is no rename: it counts for a minute only.
    """
    return (
        stat.S_ISREG(status.st_mode)
        and status.st_nlink == 2
        and abs(time.time() - status.st_ctime) < RENAME_MAX_S  # a clock that jumps ends it
    )


def exists(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def unlink(name: str, folder: int) -> bool:
    """Remove a file, never what it points to. Directories stay."""
    try:
        os.unlink(name, dir_fd=folder)
    except (FileNotFoundError, IsADirectoryError):
        return False
    return True
