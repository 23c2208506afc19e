"""A state that was set back, here or at a peer, shows in the signed lists that peers give, whatever they are asked for.

    it lists a later signature of this node       all are asked (`Asking.check`): shown, it ends this process, and the
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
from typing import TYPE_CHECKING

from hsl_node.federation.names import Peer, Round
from hsl_node.node.peers.links import FAIR_BYTES_PER_S
from hsl_node.sync.offer import Offer
from hsl_node.sync.round import Forgotten

if TYPE_CHECKING:
    from hsl_node.node.daemon import Node

log = logging.getLogger(__name__)

AGAIN_MAX = 3  # times that a checkpoint is sent again to a peer that says it has lost it; then after a restart


class SetBack:
    """One for each daemon."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._listed: dict[tuple[Round, Peer], float] = {}  # what this node waits for, since when anybody lists it
        self._lacks: dict[Peer, frozenset[Round]] = {}  # what a peer's last list lacked though it has acknowledged it
        self._again: Counter[tuple[Round, Peer]] = Counter()

    def heard(self, offer: Offer) -> None:
        """A list that a peer gave."""
        node = self._node
        if node.state is None:
            return  # a recovery asks, and looks itself
        if any(m.round > (node.journal.last_signed() or 0) for m in offer.of(node.me)):
            node.look()
        for m in offer.manifests:
            if m.round == node.state.round and m.peer in node.state.missing:
                self._listed.setdefault((m.round, Peer(m.peer)), time.monotonic())
        self._compare(offer)

    def listed(self) -> frozenset[Peer]:
        """Whom this node waits for though somebody lists that one's checkpoint of this round.

        Not what was refused here, and not what may still be on its way to an inbox that this node cannot look into.
        """
        node, state, now = self._node, self._node.known_state(), time.monotonic()
        for peer in node.others:
            if peer not in state.missing:
                node.alarms.settle(f"set back {peer}")
        self._listed = {(r, p): at for (r, p), at in self._listed.items() if r == state.round and p in state.missing}
        refused = {p for p in node.others if f"refused {p}" in node.alarms or f"setup {p}" in node.alarms}
        unseen_s = 0.0 if node.server or not self._listed else node.known_schema().file_bytes / FAIR_BYTES_PER_S
        return frozenset(p for (_, p), at in self._listed.items() if p not in refused and now - at >= unseen_s)

    def _compare(self, offer: Offer) -> None:
        """Does it lack what it acknowledged? Twice in a row: the first list may have crossed our delivery."""
        node, state, peer = self._node, self._node.known_state(), Peer(offer.peer)
        listed = {m.round for m in offer.of(node.me)}
        lacks = frozenset(
            round
            for round in (Round(offer.round), Round(offer.round + 1))
            if not offer.recovering and round >= state.round - 1 and round not in listed
            if node.journal.signed(round) is not None and (round, peer) not in state.owed
        )
        lost, self._lacks[peer] = lacks & self._lacks.get(peer, frozenset()), lacks
        if not lacks:
            node.alarms.settle(f"set back {peer}")
        if not lost:
            return
        rounds = " and ".join(map(str, sorted(lost)))
        node.alarms.sound(
            f"set back {peer}",
            f"{peer} was set back: its receipt says that it has this node's round {rounds}, its signed list that it "
            f"has not. It {'fetches' if node.server else 'is sent'} what it lacks",
            f"nothing, if it goes on within minutes; else call {peer}: was a snapshot or an old copy of it started?",
        )
        for round in sorted(lost):
            if node.server is None and self._again[round, peer] < AGAIN_MAX:
                self._again[round, peer] += 1
                log.warning("sent again", extra={"peer": peer, "round": round})
                node.apply(Forgotten(peer, round))
