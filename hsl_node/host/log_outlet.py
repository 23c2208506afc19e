"""One place that log lines go to, written by a thread of its own: whoever logs never waits for it.

A pipe that nobody reads, a terminal stopped with Ctrl-S and a disk that hangs hold the thread, not the node. What it
cannot take meanwhile is left out, counted, and the count written where the gap is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from hsl_node.errors import HslError

WAITING_MAX = 1000  # events; a burst of a few seconds
STUCK_S = 10.0  # a write that takes longer is told, though nothing has been left out yet

Event = dict[str, Any]  # what one line holds
Write = Callable[[Event], None]


class NobodyReads(HslError):
    """Raised by a `Write`: this place is gone for good (a closed pipe, a hung-up terminal)."""


@dataclass(frozen=True)
class Blocked:
    """An outlet that takes nothing now."""

    outlet: str
    left_out: int
    for_s: float


class Outlet:
    """`write` raises where it cannot, mostly OSError; each event is tried once."""

    def __init__(self, name: str, write: Write, gap: Callable[[int], Event]) -> None:
        """`gap(n)`: the event that tells of n events left out."""
        self._name, self._write, self._gap = name, write, gap
        # Not queue.Queue: an object that is collected may log in the midst of a put, and would wait for itself.
        self._waiting: SimpleQueue[tuple[int, Event | Callable[[], object]]] = SimpleQueue()
        self._skipped = 0  # since the last that was queued
        self._lost = 0  # by the thread, since the last that was written
        self._since: float | None = None  # monotonic: what is at hand is not written since then
        self.gone = False  # for good
        threading.Thread(target=self._run, name=f"log to {name}", daemon=True).start()

    def take(self, event: Event) -> None:
        """Called by one thread at a time."""
        if self.gone:
            return
        if self._waiting.qsize() >= WAITING_MAX:
            self._skipped += 1
            return
        skipped, self._skipped = self._skipped, 0
        self._waiting.put((skipped, event))

    def do(self, work: Callable[[], object]) -> None:
        """Do this between two events: after all that were taken before."""
        self._waiting.put((0, work))

    def flush(self, within_s: float) -> bool:
        """Wait until all that was taken is written, but no longer. Gives whether it is."""
        done = threading.Event()
        self.do(done.set)
        return done.wait(within_s)

    def find_blocked(self) -> Blocked | None:
        since, left_out = self._since, self._lost + self._skipped
        for_s = 0.0 if since is None else time.monotonic() - since
        return Blocked(self._name, left_out, for_s) if since is not None and (left_out or for_s > STUCK_S) else None

    def _run(self) -> None:
        while True:
            skipped, item = self._waiting.get()
            if callable(item):
                with suppress(OSError):
                    item()
                continue
            if self.gone:
                continue
            self._lost += skipped
            self._since = self._since or time.monotonic()
            try:
                if self._lost:
                    self._write(self._gap(self._lost))
                    self._lost = 0
                self._write(item)
            except NobodyReads:
                self.gone = True
            except Exception:  # mostly OSError; a bug in one line must not end all later ones
                self._lost += 1
                continue
            self._since = None
