"""A state that was set back, here or at a peer, shows in the signed lists that peers give, whatever they are asked for.

    it lists a later signature of this node       all are asked, `before_signing.py`; shown, it ends this process, the
                                                  next start recovers; the list alone is only a peer's word
    it lists a checkpoint that is waited for      fetched where it does not come by itself: see `fetch_missing.py`
    it lacks what its own receipt acknowledged    told here; it asks us for it. Where another program's server is our
                                                  inbox it cannot, so it is sent again

Between a peer's receipt and the next signature here nothing that this node signed tells of a loss, and with rounds of
hours that is where a snapshot mostly falls. Nobody passes the barrier meanwhile, so all that it needs is still kept.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from hsl_node.federation.names import Peer, Round
from hsl_node.node.alarms import Alarms
from hsl_node.node.here import Here
from hsl_node.node.machine import Happened, Machine
from hsl_node.node.peers.fetch import FAIR_BYTES_PER_S
from hsl_node.sync.findings import forgotten, lacking, newer_of_mine
from hsl_node.sync.offer import Offer
from hsl_node.sync.round import Forgotten

log = logging.getLogger(__name__)

AGAIN_MAX = 3  # times that a checkpoint is sent again to a peer that says it has lost it; then after a restart


@dataclass
class SetBack:
    here: Here
    alarms: Alarms
    machine: Machine
    ask_all: Callable[[], None]
    checkpoint_bytes: int

    def __post_init__(self) -> None:
        self._listed: dict[tuple[Round, Peer], float] = {}  # what this node waits for, since when anybody lists it
        self._lacks: dict[Peer, frozenset[Round]] = {}  # what a peer's last list lacked though it has acknowledged it
        self._again: Counter[tuple[Round, Peer]] = Counter()

    def heard(self, offer: Offer) -> None:
        """A list that a peer gave."""
        here, state = self.here, self.machine.state
        if newer_of_mine(offer, here.me, here.journal.last_signed()):
            self.ask_all()
        for m in lacking(offer, state.round, state.missing):
            self._listed.setdefault((m.round, Peer(m.peer)), time.monotonic())
        self._compare(offer)

    def listed(self) -> frozenset[Peer]:
        """Whom this node waits for though somebody lists that one's checkpoint of this round.

        Not what was refused here, and not what may still be on its way to an inbox that this node cannot look into.
        """
        here, state, now = self.here, self.machine.state, time.monotonic()
        for peer in here.others:
            if peer not in state.missing:
                self.alarms.settle(f"set back {peer}")
        self._listed = {(r, p): at for (r, p), at in self._listed.items() if r == state.round and p in state.missing}
        refused = {p for p in here.others if f"refused {p}" in self.alarms or f"setup {p}" in self.alarms}
        unseen_s = 0.0 if here.embedded or not self._listed else self.checkpoint_bytes / FAIR_BYTES_PER_S
        return frozenset(p for (_, p), at in self._listed.items() if p not in refused and now - at >= unseen_s)

    def _compare(self, offer: Offer) -> None:
        """Does it lack what it acknowledged? Twice in a row: the first list may have crossed our delivery."""
        here, state, peer = self.here, self.machine.state, Peer(offer.peer)
        recent = map(Round, range(state.round - 1, state.round + 2))
        acknowledged = {r for r in recent if here.journal.signed(r) is not None and (r, peer) not in state.owed}
        lacks = forgotten(offer, here.me, acknowledged)
        lost, self._lacks[peer] = lacks & self._lacks.get(peer, frozenset()), lacks
        if not lacks:
            self.alarms.settle(f"set back {peer}")
        if not lost:
            return
        rounds = " and ".join(map(str, sorted(lost)))
        self.alarms.sound(
            f"set back {peer}",
            f"{peer} was set back: its receipt says that it has this node's round {rounds}, its signed list that it "
            f"has not. It {'fetches' if here.embedded else 'is sent'} what it lacks",
            f"nothing, if it goes on within minutes; else call {peer}: was a snapshot or an old copy of it started?",
        )
        for round in sorted(lost):
            if not here.embedded and self._again[round, peer] < AGAIN_MAX:
                self._again[round, peer] += 1
                log.warning("sent again", extra={"peer": peer, "round": round})
                self.machine.tell(Happened(Forgotten(peer, round)))
