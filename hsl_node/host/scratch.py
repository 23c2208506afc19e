"""A folder for as long as a command runs. What a killed one left goes with the next: nobody holds its lock any more."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def scratch(parent: Path, prefix: str) -> Iterator[Path]:
    """A private folder in `parent`, gone after the block; what nobody holds of this prefix is cleared first."""
    clear(parent, prefix)
    folder, held = _made(parent, prefix)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if held is not None:
            os.close(held)


def clear(parent: Path, prefix: str) -> None:
    """Remove this user's folders of this prefix whose process is gone. Where files cannot be locked they stay."""
    for folder in parent.glob(f"{prefix}*"):
        with suppress(OSError):
            held = _hold(folder)
            try:
                if os.fstat(held).st_uid == os.geteuid():
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(held)


def _made(parent: Path, prefix: str) -> tuple[Path, int | None]:
    """The folder, and its lock; None: this file system has no locks."""
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        try:
            return folder, _hold(folder)
        except (BlockingIOError, FileNotFoundError):  # another command came to clear it before it was held
            continue
        except OSError:
            return folder, None


def _hold(folder: Path) -> int:
    """Raises: BlockingIOError: a living process holds it. FileNotFoundError: it is gone. OSError: no locks here."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(folder)  # whoever held it may have removed it
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
