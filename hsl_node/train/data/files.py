"""Files of the node's own about its images: written whole or not at all, readable by nobody else."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from hsl_node.errors import LocalStateError
from hsl_node.host import durable
from hsl_node.host.durable import Step

ABANDONED_S = 24 * 3600.0  # a half-written file this old belongs to a process that was killed
CACHES_KEPT = 3  # files of a kind per folder: today's, and those of a plan or selection one may go back to


@contextmanager
def replacing(path: Path, step: Step = Step.FILE_RESULT) -> Iterator[BinaryIO]:
    """Write a new file (mode 0600) that takes the place of `path` only when the block ends without an error.

    Raises:
        LocalStateError: the disk is full, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with durable.replacing(path, step, mode=0o600, shared=True) as file:
            yield file
    except OSError as exc:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        raise LocalStateError(
            f"{path} cannot be written: {os.strerror(exc.errno) if exc.errno else type(exc).__name__}",
            remedy="free some space on that disk" if full else "check that the folder belongs to this user",
        ) from exc


def used(path: Path) -> None:
    """Its time of change tells `drop_old` when a cache was last of use."""
    with suppress(OSError):
        os.utime(path)


def drop_old(folder: Path, suffix: str) -> None:
    """Keep the last CACHES_KEPT of a kind. A process that still maps a removed file keeps it until it ends."""
    files = sorted(folder.glob(f"*{suffix}"), key=lambda p: p.stat().st_mtime_ns, reverse=True)
    abandoned = [p for p in folder.glob(f".*{suffix}.*.tmp") if time.time() - p.stat().st_mtime > ABANDONED_S]
    for path in files[CACHES_KEPT:] + abandoned:
        with suppress(OSError):
            path.unlink()
