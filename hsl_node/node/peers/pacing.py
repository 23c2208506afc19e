"""When to ask which peer again: ever more rarely, but soon where one that was down shows itself. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from hsl_node.federation.names import Peer
from hsl_node.host.pace import Pace


@dataclass
class _Turn:
    due: float
    asked: int = 0  # how often
    is_down: bool = False  # could not be reached when it was asked last
    came: bool = False  # has connected while it was asked


class Turns:
    """All times are of one monotonic clock."""

    def __init__(self, pause: Pace, after_connect_s: float) -> None:
        """`pause`: between two questions to one peer."""
        self._pause = pause
        self._after_connect_s = after_connect_s
        self._turns: dict[Peer, _Turn] = {}

    def __contains__(self, peer: Peer) -> bool:
        return peer in self._turns

    def keep(self, peers: Collection[Peer]) -> None:
        """Forget all others."""
        self._turns = {peer: turn for peer, turn in self._turns.items() if peer in peers}

    def ask(self, peer: Peer, at: float) -> None:
        """At that time, or when it is due anyway, whichever comes first."""
        turn = self._turns.setdefault(peer, _Turn(at))
        turn.due = min(turn.due, at)

    def due(self, now: float) -> list[Peer]:
        return sorted(peer for peer, turn in self._turns.items() if turn.due <= now)

    def begin(self, peer: Peer) -> None:
        """It is being asked now."""
        if turn := self._turns.get(peer):
            turn.came = False

    def asked(self, peer: Peer, now: float, *, reached: bool) -> None:
        if turn := self._turns.get(peer):  # else it was forgotten meanwhile
            turn.asked += 1
            turn.is_down = not reached
            soon = turn.came and not reached
            turn.due = now + (self._after_connect_s if soon else self._pause.after(turn.asked))

    def connected(self, peer: Peer, now: float) -> None:
        """It is there. Who answers and connects again and again is not asked more often for that."""
        if turn := self._turns.get(peer):
            turn.came = True
            if turn.is_down or turn.asked <= 1:
                self.ask(peer, now + self._after_connect_s)
