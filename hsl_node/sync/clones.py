"""Is one key used by two processes? Pure.

Every process of the daemon has a nonce. A lock keeps two of them off one state directory, but not off two copies of
it, on two machines. A process that was followed by another one has ended; if it comes back, both live.

A login alone proves little: its last packet may arrive, held up by the network, when its process is dead and the
next one has logged in. So a login counts once its client has answered it, at the place where it stood among them.
"""

from __future__ import annotations

# One peer says that our key is at work twice, others deny it: so long is it believed. We ask everybody twice a minute
# meanwhile, and so does a clone that wants to sign: who can be reached has seen both by then.
ALONE_S = 300.0
RUNS_MAX = 64  # remembered per peer: a clone that slept for longer than 64 restarts is found by its signature


def believed(saying: int, denying: int, since_s: float) -> bool:
    """Do so many peers' words that another process has our key keep us from signing?

    Nobody can prove it to us: what a peer saw is logins. To believe too little risks two signatures for one round,
    which halt everybody; to believe one peer without end lets it stop everybody while it seems to do its part.
    """
    return saying > 1 or (saying == 1 and (denying == 0 or since_s < ALONE_S))


class Runs:
    """The processes of one peer, as they connected."""

    def __init__(self) -> None:
        self._logins = 0
        self._spans: dict[str, tuple[int, int]] = {}  # process -> its first and its last login that count
        self.contested: set[str] = set()  # these take turns

    def login(self) -> int:
        """Somebody logged in: its place in the order."""
        self._logins += 1
        return self._logins

    def seen(self, run: str, login: int) -> bool:
        """That login was this process's, which lived on after it. Is it one of two that take turns?"""
        first, last = self._spans.pop(run, (login, login))
        first, last = min(first, login), max(last, login)
        between = {other for other, span in self._spans.items() if span[0] < last and first < span[1]}
        if between:
            self.contested |= {run, *between}
        self._spans[run] = (first, last)
        newest = sorted(self._spans, key=lambda r: self._spans[r][1])[-RUNS_MAX:]
        self._spans = {r: self._spans[r] for r in newest}
        self.contested &= set(newest)
        return run in self.contested
