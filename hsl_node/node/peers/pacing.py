"""When to ask which peer again: ever more rarely, but soon where one that was down shows itself. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from hsl_node.federation.names import Peer
from hsl_node.host.pace import Pace


class Turns:
    """All times are of one monotonic clock."""

    def __init__(self, pause: Pace, after_connect_s: float) -> None:
        """`pause`: between two questions to one peer."""
        self._pause = pause
        self._after_connect_s = after_connect_s
        self._due: dict[Peer, float] = {}
        self._asked: Counter[Peer] = Counter()  # how often
        self._down: set[Peer] = set()  # could not be reached when it was asked last
        self._came: set[Peer] = set()  # has connected since it was asked last, or since that began

    def __contains__(self, peer: Peer) -> bool:
        return peer in self._due

    def keep(self, peers: Collection[Peer]) -> None:
        """Forget all others."""
        for gone in self._due.keys() - set(peers):
            del self._due[gone]
            self._asked.pop(gone, None)
            self._down.discard(gone)
            self._came.discard(gone)

    def ask(self, peer: Peer, at: float) -> None:
        """At that time, or when it is due anyway, whichever comes first."""
        self._due[peer] = min(self._due.get(peer, at), at)

    def due(self, now: float) -> list[Peer]:
        return sorted(p for p, at in self._due.items() if at <= now)

    def begin(self, peer: Peer) -> None:
        """It is being asked now."""
        self._came.discard(peer)

    def asked(self, peer: Peer, now: float, *, reached: bool) -> None:
        self._asked[peer] += 1
        pause_s = self._pause.after(self._asked[peer])
        if reached:
            self._down.discard(peer)
        else:
            self._down.add(peer)
        self._due[peer] = now + (self._after_connect_s if peer in self._came and not reached else pause_s)

    def connected(self, peer: Peer, now: float) -> None:
        """It is there. Who answers and connects again and again is not asked more often for that."""
        self._came.add(peer)
        if peer in self._due and (peer in self._down or self._asked[peer] <= 1):
            self.ask(peer, now + self._after_connect_s)
