"""Is one key used by two processes? Pure.

Every process of the daemon has a nonce. A lock keeps two of them off one state directory, but not off two copies of
it, on two machines. A process that was followed by another one has ended; if it comes back, both live.
"""

from __future__ import annotations

RUNS_MAX = 64  # remembered per peer: a clone that slept for longer than 64 restarts is found by its signature


class Runs:
    """The processes of one peer, as they connected."""

    def __init__(self) -> None:
        self._known: list[str] = []  # the newest last
        self.contested: set[str] = set()  # these take turns

    def seen(self, run: str) -> bool:
        """It connected. Is it one of two that take turns?"""
        if run in self._known:
            later = self._known[self._known.index(run) + 1 :]
            if later:
                self.contested |= {run, *later}
                self._known.remove(run)
                self._known.append(run)
        else:
            self._known = [*self._known, run][-RUNS_MAX:]
        self.contested &= set(self._known)
        return run in self.contested
