"""So many log lines a minute about each peer: none pushes all else out of the log."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from hsl_node.errors import HslError, escaped

log = logging.getLogger(__name__)

LOG_LINES_PER_MINUTE = 20  # enough to see what is going on


class LogLimit:
    """So many lines a minute about each peer, or all strangers. The rest is one line, once the minute is over."""

    def __init__(self, lines_per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = lines_per_minute
        self._clock = clock
        self._lines: Counter[str] = Counter()
        self._until = 0.0

    def allows(self, who: str) -> bool:
        """May one more line be written about `who`? A hostile peer must not push everything else out of the log."""
        self.flush()
        self._lines[who] += 1
        return self._lines[who] <= self._most

    def flush(self) -> None:
        """Say how much was left out. Call it now and then: whoever was muted may never come back."""
        now = self._clock()
        if now < self._until:
            return
        for who, lines in self._lines.items():
            if lines > self._most:
                log.warning("and more like these", extra={"about": who, "lines": lines - self._most})
        self._lines.clear()
        self._until = now + 60


@asynccontextmanager
async def one_line(event: str, peer: str) -> AsyncIterator[Callable[[HslError], None]]:
    """What is wrong with the documents of one answer, for the log: a single line, however many the peer listed."""
    wrong: list[HslError] = []
    try:
        yield wrong.append
    finally:
        if wrong:
            log.warning(event, extra={"peer": peer, "count": len(wrong), "reason": escaped(wrong[0].message)})
