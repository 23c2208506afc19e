"""Two manifests of one peer for one round, brought together from the sites where they lie, so that each has the proof.

    `inputs` of a peer's manifest name another one of NAME than the one here ──┐
    this node waits for a peer, which may have stopped for what it alone saw ──┼─► ask it for its list (`offer.py`),
    this node has halted, perhaps because another did                        ──┘   read what differs from ours
                                                                                            │
      evidence/ has both, NAME is named, the round machine is told  ◄── signed by NAME ─────┘
                              ▲
    NAME itself delivers a second one (`intake.py`); a start finds both in evidence/

What is not signed by NAME proves nothing against it; a peer that names such a manifest and cannot show it is named
itself. A peer whose inbox is another program's server cannot be asked: it asks us.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from dataclasses import dataclass

from hsl_node.errors import PeerDataError, escaped
from hsl_node.federation.names import Digest, Peer, Round
from hsl_node.host import durable
from hsl_node.host.pace import Pace
from hsl_node.node.alarms import Alarms
from hsl_node.node.here import Here, Keys
from hsl_node.node.machine import Happened, Machine
from hsl_node.node.peers.links import BEFORE_SIGNING, Links, answer
from hsl_node.node.peers.pacing import Turns
from hsl_node.sync import evidence
from hsl_node.sync.ask import read_documents
from hsl_node.sync.findings import differing
from hsl_node.sync.manifest import Manifest, content_digest
from hsl_node.sync.offer import Listed, Offer
from hsl_node.sync.round import Phase, Proven

log = logging.getLogger(__name__)

PATIENCE_S = 60.0  # a peer that is waited for this long is asked; usually it trains
AFTER_CONNECT_S = 5.0  # it is there, and still nothing arrived
PAUSE = Pace(15, 600)  # between two questions to one peer
LOOK_S = 5.0


@dataclass(frozen=True)
class Dispute:
    """`holder` has signed that it fused another manifest of `peer` than the one here."""

    holder: Peer
    peer: Peer
    round: Round
    digest: Digest


@dataclass
class Equivocations:
    here: Here
    keys: Keys
    alarms: Alarms
    links: Links
    machine: Machine

    def __post_init__(self) -> None:
        self._turns = Turns(PAUSE, AFTER_CONNECT_S)
        self._disputes: frozenset[Dispute] = frozenset()
        self._proven: set[tuple[Round, Peer]] = set()

    def connected(self, peer: Peer) -> None:
        """A peer that is waited for is there: ask it soon, if nothing arrives."""
        self._turns.connected(peer, time.monotonic())

    async def watch(self) -> None:
        """For ever."""
        for proof in evidence.kept(self.here.layout.evidence):
            self._remember(proof)
        while True:
            now = time.monotonic()
            self._look(now)
            for peer in self._turns.due(now):
                self._turns.begin(peer)
                reached = await self._ask(peer)
                self._turns.asked(peer, time.monotonic(), reached=reached)
            await asyncio.sleep(LOOK_S)

    def _remember(self, proof: evidence.Proof) -> None:
        """From before a restart, which may have come before the journal had the word of it."""
        ring, peer, round = self.keys.ring, proof.peer, proof.round
        # What was kept while its key counted is proof for good. A recovery reads more: see `_compare`.
        keys = ring.keys(peer) if proof.own else ring.chain(peer)
        try:
            evidence.require_proof(proof, keys, self.here.federation)
        except PeerDataError as exc:
            log.warning("proves nothing", extra={"peer": peer, "round": round, "reason": escaped(exc.message)})
            return
        for path in proof.paths:
            durable.accept(path)
        self._proves(peer, round)

    def _look(self, now: float) -> None:
        """Whom to ask, and when."""
        here, state = self.here, self.machine.state
        disputes = frozenset(self._disputed())
        at_once = {d.holder for d in disputes - self._disputes}
        self._disputes = disputes
        concerned = {d.holder for d in disputes}
        if state.phase is Phase.HALTED:
            concerned |= set(here.others)
        elif state.me in state.have:
            concerned |= set(state.missing)
        concerned = {p for p in concerned if not self.keys.ring.is_revoked(p)} - {here.me}
        self._turns.keep(concerned)
        for peer in concerned:
            if peer in at_once or (peer not in self._turns and state.phase is Phase.HALTED):
                self._turns.ask(peer, now)
            elif peer not in self._turns:
                self._turns.ask(peer, now + PATIENCE_S)
        for peer in here.others:
            if not any(d.holder == peer for d in disputes):
                self.alarms.settle(f"unproven {peer}")

    def _disputed(self) -> list[Dispute]:
        """From the journal alone, so a restart forgets none."""
        journal, state, found = self.here.journal, self.machine.state, []
        for round in range(max(2, state.round - 1), state.round + 2):
            known = {p: journal.manifest(round - 1, p) for p in state.peers}
            here = {p: content_digest(row["content"]) for p, row in known.items() if row}
            for holder in self.here.others:
                row = journal.manifest(round, holder)
                for peer, ours in here.items():
                    named = row["content"]["inputs"].get(peer) if row else None
                    if named not in (None, ours) and (round - 1, peer) not in self._proven:
                        found.append(Dispute(holder, peer, round - 1, Digest(named)))
        return found

    async def _ask(self, holder: Peer) -> bool:
        """False: it could not be reached."""
        reached, offer = await answer(holder, self._compare(holder))
        if offer is None:  # down, or another program's server: what is disputed stays so
            return reached
        open_ = [d for d in self._disputes if d.holder == holder and (d.round, d.peer) not in self._proven]
        if open_:
            one = min(open_, key=lambda d: (d.round, d.peer))
            lost = " It says that it has lost its documents." if offer.recovering else ""
            self.alarms.sound(
                f"unproven {holder}",
                f"{holder} says that it fused another manifest of {one.peer} for round {one.round} than the one here, "
                f"and shows none that {one.peer} signed: nothing is proven against {one.peer}.{lost}",
                f"call {holder} and {one.peer}: compare `hsl-node round show {one.round}` at the three sites",
            )
        return True

    async def _compare(self, holder: Peer) -> Offer:
        """Read what the peer holds otherwise than this node.

        Raises:
            TransportError: it cannot be asked now; `OperationFailed`: not at all.
            PeerDataError: its answer is not its own.
        """
        here, ring = self.here, self.keys.ring
        offer = await self.links.offer_of(holder, BEFORE_SIGNING)
        # Not of the opening statement, which may be corrected.
        listed = {(m.round, Peer(m.peer)) for m in offer.manifests if m.round > 0 and m.peer in here.federation.peers}
        ours = {of: row for of in listed if (row := here.journal.manifest(*of))}
        documents = {of: hashlib.sha256(row["document"]).hexdigest() for of, row in ours.items()}
        disputed = {(d.round, d.peer) for d in self._disputes}
        wanted = differing(offer, documents, disputed)
        if not wanted:
            return offer

        def take(listed: Listed, manifest: Manifest, document: bytes) -> None:
            row = ours[listed.round, Peer(listed.peer)]
            if manifest.digest != content_digest(row["content"]):
                self.keep(row["document"], manifest, document)

        link = self.links.connected(holder, BEFORE_SIGNING)
        unproven = (m for m in wanted if (m.round, m.peer) not in self._proven)
        # Who has a key that was revoked or replaced can sign a second manifest at any time: it proves nothing.
        await read_documents(link, holder, unproven, here.federation, ring.keys, take=take, passes=lambda *_: True)
        return offer

    def keep(self, first: bytes, manifest: Manifest, second: bytes) -> None:
        """Two manifests of one round, both verified, that differ: keep both, and act on it."""
        round, peer = manifest.round, Peer(manifest.peer)
        if (round, peer) in self._proven:
            return
        evidence.keep(self.here.store, self.keys.ring, round, peer, (first, second))
        log.error("equivocation", extra={"peer": peer, "round": round})
        self._proves(peer, round)

    def _proves(self, peer: Peer, round: Round) -> None:
        """Name who signed two, and tell the round machine.

        The one rule, of any peer, this node included, and of any round, however long ago: who sees the proof later, or
        again after a restart, must not decide otherwise than who saw it at once.
        """
        self._proven.add((round, peer))
        self._name(peer, round)
        self.machine.tell(Happened(Proven(peer, round)))

    def _name(self, peer: Peer, round: Round) -> None:
        here = self.here
        text = f"{peer} signed two different manifests for round {round}; proof in {here.layout.evidence}"
        remedy = "call that hospital: its node was cloned, restored from an old backup, or taken over"
        if peer == here.me and (left_out := evidence.left_out(here.journal, here.others, peer, round)):
            says = "; ".join(f"{p} (its newest was round {newest})" for p, newest in sorted(left_out.items()))
            text += f". When this node recovered, these signed that they held nothing of it for that round: {says}"
            remedy = (
                "find out where the other manifest was then: who held it said something wrong. "
                "`hsl-node verify --export DIR` writes what each signed"
            )
            log.error("left out at the recovery", extra={"round": round, "peers": ", ".join(sorted(left_out))})
        self.alarms.sound(f"equivocation {peer}", text, remedy)
