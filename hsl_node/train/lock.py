"""One trainer per folder: two would overwrite each other's epoch checkpoints."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import IO

from hsl_node.errors import AlreadyRunning

LOCK_FILE = "lock"
WAIT_S = 20.0  # a predecessor whose daemon died leaves as soon as its current operation lets it
POLL_S = 0.1


def hold_lock(folder: Path, wait_s: float = WAIT_S) -> IO[str]:
    """Hold the folder's lock while the file that comes back is open; it goes with the process, however it ends.

    Raises:
        AlreadyRunning: another process holds it, and goes on holding it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / LOCK_FILE, "w", encoding="utf-8")  # noqa: SIM115 (the caller's to close)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError as exc:
            if time.monotonic() >= deadline:
                file.close()
                raise AlreadyRunning(
                    f"another process trains in {folder}", remedy="let it finish, or end it, and try again"
                ) from exc
            time.sleep(POLL_S)
