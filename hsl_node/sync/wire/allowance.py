"""What both ends allow the other: a login's time, and so much of something in each stretch of time."""

from __future__ import annotations

# To greet, agree on keys and log in: some KB over a line that others saturate, or eight round trips of 4 s. The same at
# both ends: where the server's was shorter, a client that was patient enough never came in.
LOGIN_S = 60.0
PACKETS_PER_MINUTE = 3000  # without data, per peer: 500 connections, or 1500 session keys of 512 MB or more
# SFTP requests, packets of data and windows, beside those that data pays for: 240 lists of what is kept for a peer and
# 60 connections that ask for sizes take 5000; 30,000 cost one to two seconds.
REQUESTS_PER_MINUTE = 30_000


class Allowance:
    """So much of something in each stretch of time. For one peer."""

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._seconds = most, seconds
        self._since, self._taken = float("-inf"), 0

    def take(self, amount: int, now: float) -> bool:
        """May this much more be taken? Less than 0 gives back. `now` is monotonic."""
        if now - self._since >= self._seconds:
            self._since, self._taken = now, 0
        if self._taken + amount > self._most:
            return False
        self._taken = max(0, self._taken + amount)
        return True
