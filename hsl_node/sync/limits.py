"""What strangers and peers may take of the embedded inbox, and the counts of what they tried."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from hsl_node.errors import HslError, escaped
from hsl_node.sync.names import Peer

log = logging.getLogger(__name__)

SOURCES_PER_PEER = 4  # two gateways with two kinds of address
PACKETS_PER_MINUTE = 3000  # without data, per peer: 500 connections, or 1500 session keys of 512 MB or more
# SFTP requests, packets of data and windows, beside those that data pays for: 240 lists of what is kept for a peer and
# 60 connections that ask for sizes take 5000; 30,000 cost one to two seconds.
REQUESTS_PER_MINUTE = 30_000
LOG_LINES_PER_MINUTE = 20  # enough to see what is going on; the counters count on


@dataclass(frozen=True)
class Quota:
    """What one sender may hold here at a time, in parts/ and inbox/ together."""

    files: int = 16  # a checkpoint and a manifest for two rounds, four times over
    bytes: int = 4096 * 1024 * 1024
    reserve_bytes: int = 256 * 1024 * 1024  # of the disk; no peer's write takes of it: the journal must go on


@dataclass(frozen=True)
class Limits:
    """What strangers and peers may take of us. Tests lower them; the defaults suit 64 peers and 4 Mbit/s links."""

    login_timeout_s: float = 20
    login_attempts: int = 4
    strangers: int = 64  # unauthenticated connections in total, and as many from sources that peers logged in from
    strangers_per_source: int = 16  # per IPv4 address or IPv6 /64; hospitals may share one gateway
    connections_per_peer: int = 2  # the live one and one that the network has forgotten
    sessions_per_peer: int = 2
    handles_per_connection: int = 8
    idle_s: float = 600  # without any request
    progress_s: float = 120  # an unfinished transfer must get on by `progress_bytes` in this time, or the link is cut;
    progress_bytes: int = 64 * 1024  # 64 peers on one 4 Mbit/s line get fifteen times as much each
    sweep_s: float = 5
    offers_per_minute: int = 240  # lists of what is kept for a peer, 15 ms each; a node asks before each signature
    offer_files_per_hour: int = 160  # bytes of so many checkpoints: own, of 63 others for two rounds, and again
    # Of its own files, beside what it writes meanwhile: a resume compares one block of 1 MiB. Half of a 4 Mbit/s line.
    read_back_bytes_per_minute: int = 16 * 1024 * 1024
    packets_per_minute: int = PACKETS_PER_MINUTE
    requests_per_minute: int = REQUESTS_PER_MINUTE
    log_lines_per_minute: int = LOG_LINES_PER_MINUTE  # per peer, and for all strangers together; the counters count on
    quota: Quota = field(default_factory=Quota)


class Sources:
    """From where each peer logged in, the newest few: a hostile one can't fill the table."""

    def __init__(self) -> None:
        self._of: dict[Peer, list[str]] = {}

    def add(self, peer: Peer, source: str) -> None:
        before = [s for s in self._of.get(peer, ()) if s != source]
        self._of[peer] = [*before, source][-SOURCES_PER_PEER:]

    def __contains__(self, source: str) -> bool:
        return any(source in sources for sources in self._of.values())


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


@dataclass
class Counters:
    """For metrics. Only ever grow, except `unauthenticated`."""

    rejected: Counter[tuple[Peer, str]] = field(default_factory=Counter)  # (peer, code) -> times
    auth_failures: int = 0
    evicted: int = 0  # unauthenticated connections closed to make room
    flooded: int = 0  # unauthenticated connections cut for what they sent
    unauthenticated: int = 0  # now


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
async def one_line(event: str, peer: Peer) -> AsyncIterator[Callable[[HslError], None]]:
    """What is wrong with the documents of one answer, for the log: a single line, however many the peer listed."""
    wrong: list[HslError] = []
    try:
        yield wrong.append
    finally:
        if wrong:
            log.warning(event, extra={"peer": peer, "count": len(wrong), "reason": escaped(wrong[0].message)})
