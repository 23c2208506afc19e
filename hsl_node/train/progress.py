"""Progress callbacks that speak at most once a second. They are also the trainer's proof of life."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Report = Callable[[dict[str, Any]], None]  # hears a trainer's events (see worker.py)
Progress = Callable[[int, int], None]  # (images done, images in total)

PROGRESS_EVERY_S = 1.0


def unheard(done: int, total: int) -> None:
    """Nobody listens."""


def ticker(report: Report, what: str) -> Progress:
    """A callback that reports `busy` events."""
    last = 0.0

    def tick(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= PROGRESS_EVERY_S:
            last = now
            report({"event": "busy", "what": what, "done": done, "total": total})

    return tick
