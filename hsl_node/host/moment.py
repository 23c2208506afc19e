"""When something was, so that a clock that is set does not change how long ago: monotonic inside, wall clock shown."""

from __future__ import annotations

import time

SET_S = 1.0  # less is the measuring, or a clock that NTP slows


class Moment:
    """A moment of this process; `Moment(at)`: the one that a clock, a journal's say, called `at`."""

    def __init__(self, at: float | None = None) -> None:
        """Never in the future, whatever was wrong with the clock that said `at`."""
        now = time.time()
        self._wall = now if at is None else min(at, now)
        self._monotonic = time.monotonic() - (now - self._wall)

    @property
    def wall(self) -> float:
        """By the clock of the wall as it is set now: what it said then, where nobody has set it since."""
        found = time.time() - self.ago_s
        return self._wall if abs(found - self._wall) < SET_S else found

    @property
    def ago_s(self) -> float:
        return time.monotonic() - self._monotonic
